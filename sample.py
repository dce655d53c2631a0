"""Write answers with a trained memory: python sample.py [--prompt TEXT] [--show-steps]

Takes the newest checkpoint in out/, or --init llada, dream, ... and --memory FILE. A text with
blanks is completed by --infill, one token for each underscore. --html FILE writes one page that
shows every denoising step, with the memory and without.
"""
import argparse
import re
import sys
from html import escape
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusion import DREAM_REMASKING, LLADA_REMASKING, generate
from eval_gsm8k import PROTOCOLS, dial_problems
from metastate import model_arguments, open_models
from model import Backbone, Tokenizer, ensure, run_program, start_device, write_atomically

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>MetaState by steps</title>
<style>
:root { color-scheme: light dark; font: 15px system-ui, sans-serif }
body { max-width: 75em; margin: 1.5em auto; padding: 0 1em }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(24em, 1fr)); gap: 2em }
.text { font: 14px/2 monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.text span { border-radius: 3px; padding: 2px 1px } .now { outline: 2px solid }
.text .later { color: transparent; background: #8884 !important } svg .later { visibility: hidden }
input, svg { width: 100% } svg { height: 9em; outline: 1px solid }
rect { fill: hsl(265 80% 55%); shape-rendering: crispEdges }
</style>
<h1>Denoising, step by step</h1>
<label>step <output></output> (arrow keys)<input type="range" min="0" max="LAST"></label>
<p>Hue: the step that revealed a token. Opacity: how sure it was. Outlined: new in this step. Grey:
masked. &#8718; end of text.</p>
<main>RUNS</main>
<script>
const slider = document.querySelector("input"), marked = document.querySelectorAll("[data-k]");
function show(k) {
  slider.value = k; document.querySelector("output").value = slider.value;
  for (const e of marked) {
    e.classList.toggle("later", +e.dataset.k > slider.value);
    e.classList.toggle("now", e.tagName == "SPAN" && e.dataset.k == slider.value); } }
slider.oninput = () => show(slider.value);
document.onkeydown = event => {
  const d = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (d) { event.preventDefault(); show(+slider.value + d); } };
show(0);
</script></html>
"""

def heat_map(what: str, rows: list[list[float]]) -> str:
    """One number for every slot (down) and step (across), marked with the step."""
    top = max(map(max, rows)) or 1
    cells = (f'<rect data-k="{k + 1}" x="{k}" y="{i}" width="1" height="1" opacity="{x / top}"/>'
             for k, row in enumerate(rows) for i, x in enumerate(row))
    return (f'<p>{what} of the memory: slots down, steps across</p><svg viewBox="0 0 {len(rows)} '
            f'{len(rows[0])}" preserveAspectRatio="none">{"".join(cells)}</svg>')

def run(name: str, ids: torch.Tensor, gen_length: int, tokenizer: Tokenizer, backbone: Backbone,
        show: bool, **settings) -> tuple[torch.Tensor, int, str]:
    """generate's ids; how many steps it took; and the first sample by steps, as HTML."""
    c, start = backbone.config, F.pad(ids[0], (0, gen_length), value=backbone.config.mask_id)
    special = {c.mask_id: "\u2591", c.eos_id: "\u220e"}
    by_step, sure = torch.zeros_like(start), torch.zeros(start.shape, device=start.device)
    first, traces = int((start == c.mask_id).nonzero()[0]), []

    def pieces(ids: torch.Tensor) -> list[str]:
        return [special.get(i) or tokenizer.decode([i]) for i in ids.tolist()]

    def on_step(canvas, revealed, confidence, trace) -> None:
        traces.append({key: value[0].tolist() for key, value in trace[0].items()} if trace else {})
        by_step[revealed[0]] = len(traces)
        value = confidence[0, revealed[0]].float()
        sure[revealed[0]] = torch.where(value > 0, value, value.exp()).clamp(max=1)   # of -entropy
        if show:
            change = traces[-1].get("slot_change", [])
            bar = "".join(" ▁▂▃▄▅▆▇█"[min(8, round(8 * x))] for x in change)
            print(f"{len(traces):4d} |{bar}| {''.join(pieces(canvas[0, first:]))!r}")

    out = generate(backbone, ids, gen_length=gen_length, on_step=on_step, **settings)
    spans = [escape(text) if not k else
             f'<span data-k="{k}" title="step {k}, {p:.3f}" style="background: hsl('
             f'{360 * (k - 1) // len(traces)} 80% 50% / {.15 + p / 2})">{escape(text)}</span>'
             for text, k, p in zip(pieces(out[0]), by_step.tolist(), sure.tolist())]
    maps = [heat_map(key.replace("_", " "), [trace[key] for trace in traces])
            for key in ("slot_change", "update_gate") if traces[0]]
    return out, len(traces), "".join([f'<section><h2>{name}</h2><p class="text">', *spans[:first],
                                      '</p><p class="text">', *spans[first:], "</p>", *maps,
                                      "</section>"])

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
    c, gen_length, prompt = backbone.config, 0, args.prompt
    tiny = PROTOCOLS["dial"].settings if c.kind == "tiny" else {}
    if args.infill is None:
        if prompt is None and tiny:
            prompt = dial_problems("test", 1 + args.seed)[-1]["question"]
        ensure(prompt, "there is no prompt; say what to answer with --prompt TEXT")
        ids = tokenizer.chat([{"role": "user", "content": prompt}])
        gen_length = args.gen_length or tiny.get("gen_length", 128)
        print(prompt)
    else:
        ensure("_" in args.infill, "--infill has no blank; write one _ for each token to fill in")
        ids = [i for part in re.split("(_)", args.infill)
               for i in ([c.mask_id] if part == "_" else tokenizer.encode(part, special=False))]
    settings = dict(
        gen_length=gen_length, threshold=args.threshold, temperature=args.temperature,
        steps=args.steps or tiny.get("steps") or gen_length or ids.count(c.mask_id),
        block_length=args.block_length or (32 if c.kind == "llada" and gen_length else None),
        remasking=args.remasking or ("entropy" if c.kind == "dream" else "low_confidence"),
        seeds=range(args.seed, args.seed + args.num_samples), tokenizer=tokenizer,
        backbone=backbone, ids=torch.tensor([ids] * args.num_samples, device=device))
    out, last, page = run("With memory" if memory else "Without memory", memory=memory,
                          show=args.show_steps, **settings)
    for row in out.tolist():
        print(tokenizer.decode(row[len(ids):] if gen_length else row, skip_special=True))
    if args.html:
        if memory:
            _, steps, other = run("Without memory", show=False, **settings)
            last, page = max(last, steps), page + other
        text = PAGE.replace("LAST", str(last)).replace("RUNS", page)
        write_atomically(args.html, lambda file: file.write(text.encode()))
        print(f"{args.html}: open it in a browser", file=sys.stderr)

if __name__ == "__main__":
    run_program(main)
