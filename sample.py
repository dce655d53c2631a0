"""Write answers with a trained memory: python sample.py [--prompt TEXT] [--show-steps]

Takes the newest checkpoint in out/, or --init llada, dream, ... and --memory FILE. A text with
blanks is completed by --infill, one token for each underscore. --html FILE writes one page that
shows every denoising step, with the memory and without.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusion import DREAM_REMASKING, LLADA_REMASKING, generate
from eval_gsm8k import dial_problems
from metastate import model_arguments, open_models
from model import Backbone, Config, Tokenizer, ensure, run_program, start_device, write_atomically

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>MetaState by steps</title>
<style>
:root { color-scheme: light dark; font: 15px system-ui, sans-serif }
body { max-width: 75em; margin: 1.5em auto; padding: 0 1em }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(24em, 1fr)); gap: 2em }
.text { font: 14px/2 monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.text span { border-radius: 3px; padding: 2px 1px; color: CanvasText }
.text .now { outline: 2px solid CanvasText } .text .mask, small { color: GrayText }
input, canvas { width: 100% } canvas { height: 9em; image-rendering: pixelated; outline: 1px solid }
</style>
<h1>Denoising, step by step</h1>
<label>step <output id="at"></output> (arrow keys)<input id="slider" type="range" min="0"></label>
<p><small>Hue: the step that revealed a token. Opacity: how sure it was. Outlined: new in this step.
&#9617; masked, &#8718; end of text.</small></p><main id="runs"></main>
<script>
const runs = DATA, find = id => document.getElementById(id), slider = find("slider");
const last = Math.max(...runs.map(run => run.steps));
function make(tag, to, text, name = "") {
  const e = document.createElement(tag); e.textContent = text; e.className = name;
  to.append(e); return e; }
const views = runs.map(run => {
  const box = make("section", find("runs"), ""), maps = [];
  make("h2", box, run.name); make("p", box, run.prompt, "text");
  const text = make("p", box, "", "text");
  for (const [key, what] of [["slot_change", "change"], ["update_gate", "update gate"]])
    if (run[key].length) {
      make("small", box, what + " of the memory: slots down, steps across");
      const map = make("canvas", box, "");
      map.width = run[key].length; map.height = run[key][0].length; maps.push([map, run[key]]); }
  return [run, text, maps]; });
function show(k) {
  slider.value = k; find("at").textContent = `${k} of ${last}`;
  for (const [run, text, maps] of views) {
    text.textContent = ""; const now = Math.min(k, run.steps);
    run.final.forEach((token, i) => {
      const r = run.revealed[i], name = r > now ? "mask" : r > 0 && r == now ? "now" : "";
      const span = make("span", text, r > now ? "\\u2591" : token, name);
      if (r > 0 && r <= now) {
        span.title = `step ${r}, ${run.sure[i].toFixed(3)}`;
        const opacity = .15 + .5 * Math.min(1, Math.max(0, run.sure[i]));
        span.style.background = `hsl(${360 * (r - 1) / last} 80% 50% / ${opacity})`; } });
    for (const [map, rows] of maps) {
      const g = map.getContext("2d"), top = Math.max(...rows.flat(), 1e-9);
      g.clearRect(0, 0, map.width, map.height);
      rows.slice(0, now).forEach((row, x) => row.forEach((v, y) => {
        g.fillStyle = `hsl(265 80% 55% / ${v / top})`; g.fillRect(x, y, 1, 1); })); } } }
slider.max = last; slider.oninput = () => show(+slider.value);
document.onkeydown = event => {
  const d = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (d) { event.preventDefault(); show(Math.min(last, Math.max(0, +slider.value + d))); } };
show(0);
</script></html>
"""

def pieces(tokenizer: Tokenizer, ids: list[int], c: Config) -> list[str]:
    """One printable piece for each token; a mask is a shaded box, end-of-text a filled one."""
    return [{c.mask_id: "\u2591", c.eos_id: "\u220e"}.get(i) or tokenizer.decode([i]) for i in ids]

def print_step(k: int, text: list[str], change: list[float]) -> None:
    bar = "".join(" ▁▂▃▄▅▆▇█"[min(8, round(8 * x))] for x in change)
    print(f"{k:4d} |{bar}| {''.join(text)!r}")

def run(name: str, ids: torch.Tensor, gen_length: int, tokenizer: Tokenizer, backbone: Backbone,
        show: bool, **settings) -> tuple[torch.Tensor, dict]:
    """generate's ids, and what it did to the first sample step by step, as the page shows it."""
    c, start = backbone.config, F.pad(ids[0], (0, gen_length), value=backbone.config.mask_id)
    first = int((start == c.mask_id).nonzero()[0])
    revealed = torch.where(start == c.mask_id, -1, 0)       # by which step; 0: given
    sure, traces = torch.zeros(len(start), device=start.device), []

    def on_step(canvas, new, confidence, trace) -> None:
        revealed[new[0]] = k = len(traces) + 1
        sure[new[0]] = confidence[0, new[0]].float()
        traces.append({key: value[0].tolist() for key, value in trace[0].items()} if trace else {})
        if show:
            print_step(k, pieces(tokenizer, canvas[0, first:].tolist(), c),
                       traces[-1].get("slot_change", []))

    out = generate(backbone, ids, gen_length=gen_length, on_step=on_step, **settings)
    text = pieces(tokenizer, out[0].tolist(), c)
    page = {"name": name, "prompt": "".join(text[:first]), "final": text[first:],
            "revealed": revealed[first:].tolist(), "sure": sure[first:].tolist(),
            "steps": len(traces), **{key: [trace[key] for trace in traces if trace]
                                     for key in ("slot_change", "update_gate")}}
    return out, page

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model_arguments(parser)
    add = parser.add_argument_group("text").add_argument
    add("--prompt", help="what the user says (default for tiny: one of the built-in problems)")
    add("--infill", metavar="TEXT", help="complete this text in place, a token for each _")
    add("--num-samples", type=int, default=1)
    add("--show-steps", action="store_true", help="print every step, and the change of each slot")
    add("--html", type=Path, metavar="FILE", help="write the steps as a page")
    add = parser.add_argument_group("sampling").add_argument
    add("--gen-length", type=int, help="tokens of the answer (default: 20 for tiny, else 128)")
    add("--steps", type=int, help="denoising steps (default: 5 for tiny, else one a token)")
    add("--block-length", type=int, help="default: all at once for tiny and Dream, else 32")
    add("--temperature", type=float, default=0.0)
    add("--threshold", type=float, help="reveal whatever is surer, in as many steps as it takes")
    add("--remasking", choices=LLADA_REMASKING + DREAM_REMASKING, help="default: the model's own")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    device, _, _ = start_device(args.device)
    backbone, tokenizer, memory, _ = open_models(args, device)
    c = backbone.config
    gen_length, prompt = 0, args.prompt
    if args.infill is None:
        if prompt is None and c.kind == "tiny":
            prompt = dial_problems("test", 1 + args.seed)[-1]["question"]
        ensure(prompt, "there is no prompt; say what to answer with --prompt TEXT")
        ids = tokenizer.chat([{"role": "user", "content": prompt}])
        gen_length = args.gen_length or (20 if c.kind == "tiny" else 128)
        print(prompt)
    else:
        ensure("_" in args.infill, "--infill has no blank; write one _ for each token to fill in")
        ids = [i for part in re.split("(_)", args.infill)
               for i in ([c.mask_id] if part == "_" else tokenizer.encode(part, special=False))]
    settings = dict(
        gen_length=gen_length, threshold=args.threshold, temperature=args.temperature,
        steps=args.steps or (5 if c.kind == "tiny" else gen_length or ids.count(c.mask_id)),
        block_length=args.block_length or (32 if c.kind == "llada" and gen_length else None),
        remasking=args.remasking or ("entropy" if c.kind == "dream" else "low_confidence"),
        seeds=range(args.seed, args.seed + args.num_samples))
    batch = torch.tensor([ids] * args.num_samples, device=device)
    out, page = run("with memory" if memory else "without memory", batch, tokenizer=tokenizer,
                    backbone=backbone, show=args.show_steps, memory=memory, **settings)
    for row in out.tolist():
        print(tokenizer.decode(row[len(ids):] if gen_length else row, skip_special=True))
    if args.html:
        pages = [page]
        if memory:
            pages += [run("without memory", batch, tokenizer=tokenizer, backbone=backbone,
                          show=False, **settings)[1]]
        text = PAGE.replace("DATA", json.dumps(pages).replace("<", "\\u003c"), 1)
        write_atomically(args.html, lambda file: file.write(text.encode()))
        print(f"{args.html}: open it in a browser", file=sys.stderr)

if __name__ == "__main__":
    run_program(main)
