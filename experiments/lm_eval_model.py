"""MATH-500, HumanEval, MBPP and more through lm-evaluation-harness, which this script alone needs:

    pip install "lm-eval[math]==0.4.13"
    HF_ALLOW_CODE_EVAL=1 python experiments/lm_eval_model.py --init llada \
        --memory out/llada/memory.pt --protocol paper \
        --tasks minerva_math500,humaneval,mbpp --confirm-run-unsafe-code

The harness brings problems, prompts, solved examples and scores. From the protocol, one of
eval_gsm8k.py's, come the settings of sampling and whether a prompt is put as the turn of a chat;
with --protocol paper this is how MetaState's own table was sampled. humaneval and mbpp execute what
the model wrote: the harness wants the consent of the flag above and HF_ALLOW_CODE_EVAL=1.
"""
import argparse
import json
import os
import sys
from pathlib import Path

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError as error:
    sys.exit(f"error: {error}; this script needs pip install \"lm-eval[math]==0.4.13\"")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffusion import generate  # noqa: E402
from eval_gsm8k import PROTOCOLS, Protocol, answer_text, choose_protocol, left_padded  # noqa: E402
from model import InputError, blame, ensure, write_atomically  # noqa: E402
from sample import (COUNT, COUNT_OR_ZERO, Models, add_model_options,  # noqa: E402
                    add_sampling_options, choose_models, open_models, prompt_ids, run_program,
                    sampling_settings, start_device, warn_of_length)

NO_LIKELIHOODS = ("asks for likelihoods, which a sampler of masked diffusion does not give; take a "
                  "task that generates, gsm8k for example")


@register_model("metastate")
class MetaStateLM(LM):
    """A masked diffusion model, with or without a memory, as the harness wants to see it."""

    def __init__(self, models: Models, protocol: Protocol, settings: dict, batch_size: int,
                 seed: int):
        super().__init__()
        self.models = models
        self.protocol = protocol
        self.settings = settings
        self.batch_size = batch_size
        self.seed = seed

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        backbone, tokenizer, memory = self.models
        # the protocol's control tokens; words such as Q: end GSM8K's answers only
        controls = [stop for stop in self.protocol.stops if stop.startswith("<")]
        prompts = [prompt_ids(tokenizer, request.args[0], self.protocol.chat)
                   for request in requests]
        warn_of_length(backbone.config, max(map(len, prompts)) + self.settings["gen_length"])
        texts = []
        for first in range(0, len(requests), self.batch_size):
            batch = requests[first:first + self.batch_size]
            ids, attention_mask = left_padded(prompts[first:first + self.batch_size], backbone)
            seeds = range(self.seed + first, self.seed + first + len(batch))
            canvas = generate(backbone, ids, attention_mask=attention_mask, memory=memory,
                              seeds=seeds, **self.settings)
            for request, row in zip(batch, canvas[:, ids.shape[1]:].tolist()):
                stops = (*request.args[1].get("until", []), *controls)
                texts.append(answer_text(tokenizer, row, stops))
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list:
        raise InputError(f"a task {NO_LIKELIHOODS}")

    loglikelihood_rolling = loglikelihood      # the harness wants both to be there


def check_tasks(manager: TaskManager, names: list[str], may_execute: bool) -> None:
    """Load the tasks once before a model is loaded: what they need is often not there."""
    for name in names:
        ensure(name in manager.task_index, f"the harness has no task {name!r}; `lm-eval ls tasks` "
               "lists them, and --include-path adds yours")
        config = manager.task_index[name].cfg or {}
        ensure(may_execute or not config.get("unsafe_code"), f"task {name} executes what the model "
               "writes; where that is safe, give --confirm-run-unsafe-code and set "
               "HF_ALLOW_CODE_EVAL=1")
    with blame(f"--tasks {','.join(names)}", "see the harness's README of the task"):
        tasks = manager.load(names)["tasks"]
    for name, task in tasks.items():
        generates = task.get_config("output_type") == "generate_until"
        ensure(generates, f"task {name} {NO_LIKELIHOODS}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser)
    add = parser.add_argument_group("harness").add_argument
    add("--tasks", required=True, help="names of the harness's tasks, separated by commas")
    add("--protocol", choices=PROTOCOLS, help="whose settings of sampling, and whether to chat "
        "(default: by --init, as eval_gsm8k.py chooses)")
    add("--include-path", type=Path, help="a folder with task files of your own")
    add("--num-fewshot", type=COUNT_OR_ZERO, help="default: the task's")
    add("--limit", type=COUNT, help="only the first so many problems of each task")
    add("--batch-size", type=COUNT, default=16)
    add("--out", type=Path, default=Path("out/lm_eval.json"), help="where the results go")
    add("--confirm-run-unsafe-code", action="store_true", help="let tasks execute written code")
    add_sampling_options(parser, "the protocol's")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    choice = choose_models(args)
    name, protocol = choose_protocol(args.protocol, choice, args.chat)
    settings = sampling_settings(args, protocol.settings)
    tasks = args.tasks.split(",")
    manager = TaskManager(include_path=args.include_path)
    may_execute = args.confirm_run_unsafe_code and os.environ.get("HF_ALLOW_CODE_EVAL") == "1"
    check_tasks(manager, tasks, may_execute)
    device, _ = start_device(args.device, choice.kind)
    models = open_models(choice, args, device)
    found = simple_evaluate(
        MetaStateLM(models, protocol, settings, args.batch_size, args.seed), tasks=tasks,
        num_fewshot=args.num_fewshot, limit=args.limit, task_manager=manager,
        confirm_run_unsafe_code=may_execute, bootstrap_iters=1000)
    print(make_table(found))
    identity = {"init": choice.name, "backbone": models.backbone.digest(),
                "memory": choice.checkpoint["digest"] if models.memory else None}
    saved = {"identity": identity, "protocol": name, "chat": protocol.chat,
             "settings": settings, "results": found["results"]}
    write_atomically(args.out, json.dumps(saved, default=str).encode())
    print(f"the results are in {args.out}")


if __name__ == "__main__":
    run_program(main, if_interrupted="nothing is kept")
