"""What holding a model in 8 or 4 bits costs and saves: memory, disk, speed, scores on the starter corpus.

    python benchmarks/quantization.py quickstart-out/model --out quantization

Every way of holding it runs in a process of its own. Writes OUT/quantization.json and OUT/quantization.md. Tokens are
counted against CPU time of one thread, which other load does not change much; on a GPU against the clock. Scores are of
the corpus's held-out items, with `unimoe evaluate`'s own tasks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from unimoe.evaluation.results import score_run
from unimoe.evaluation.running.answerers import ChatAnswerer
from unimoe.evaluation.running.batches import BatchAnswerer
from unimoe.evaluation.running.predictions import PredictionStore
from unimoe.evaluation.running.runner import PREDICTIONS, PlannedTask, plan_run
from unimoe.evaluation.tasks.catalogue import find_tasks
from unimoe.model_opener import open_model
from unimoe.quantization import KINDS, LIBRARIES, quantization_config

WAYS = ("as saved", *(f"{library} {kind}" for library in LIBRARIES for kind in KINDS))
PROMPT_TOKENS = 32
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder of a model of ours")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="(default: all)")
    parser.add_argument("--limit", type=int, default=40, metavar="N", help="items of each task (default: 40)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="generated for the speed (default: 128)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # in this process, as a line of JSON
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, args.ways[0])))
        return
    rows = [_in_own_process(args, way) for way in args.ways]
    facts = {
        "model": Path(args.model).resolve().name,
        "items_per_task": args.limit,
        "tokens": args.tokens,
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "load_average": os.getloadavg()[0],
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quantization.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    (args.out / "quantization.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


def _in_own_process(args: argparse.Namespace, way: str) -> dict[str, Any]:
    command = [sys.executable, __file__, args.model, "--out", str(args.out), "--ways", way, "--one"]
    command += ["--limit", str(args.limit), "--tokens", str(args.tokens), "--device", args.device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace, way: str) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(1)
    processor, model = _open(args.model, way, args.device)
    row: dict[str, Any] = {"way": way, "memory_mib": held_bytes(model) / MIB}
    decoder = model.model.language_model
    row["decoder_layers_mib"] = held_bytes(decoder.layers) / MIB
    with tempfile.TemporaryDirectory() as folder:  # first: bitsandbytes rearranges weights with the first input
        model.save_pretrained(folder)
        row["disk_mib"] = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / MIB
    row["tokens_per_second"] = speed(model, args.tokens)
    row["scores"] = scores(ChatAnswerer(model, processor), args.limit, args.device != "cpu")
    return row


def _open(folder: str, way: str, device: str) -> tuple[Any, Any]:
    if way == "as saved":
        return open_model(folder, device)
    from transformers import AutoModelForCausalLM, AutoProcessor

    library, kind = way.split()
    config = quantization_config(kind, library=library)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": device})
    return AutoProcessor.from_pretrained(folder), model.eval()


def held_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, scales and the like of quantised ones included."""
    total = 0
    for tensor in (*module.parameters(), *module.buffers()):
        state = getattr(tensor, "quant_state", None)  # of bitsandbytes in 4 bits
        scales = [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
        names = tensor.__tensor_flatten__()[0] if hasattr(type(tensor), "tensor_data_names") else []
        inner = [getattr(tensor, name) for name in names] or [tensor]
        rows = getattr(tensor, "SCB", None)  # of bitsandbytes in 8 bits
        total += sum(one.nbytes for one in (*inner, *scales, *([] if rows is None else [rows])))
    return total


def speed(model: Any, tokens: int) -> float:
    """Generated tokens of one text per second of this thread, or of the GPU."""
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    ids = torch.randint(8, model.config.text_config.vocab_size, (1, PROMPT_TOKENS), device=model.device)
    best = 0.0
    for length in (4, tokens, tokens):  # the first builds kernels and caches
        start = clock()
        output = model.generate(input_ids=ids, max_new_tokens=length, min_new_tokens=length, do_sample=False)
        best = max(best, (output.shape[1] - PROMPT_TOKENS) / (clock() - start))
    return best


def scores(answerer: ChatAnswerer, limit: int, on_gpu: bool) -> dict[str, Any]:
    """Task -> score in percent and number of items."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        planned = plan_run(find_tasks(["starter"]), out, out, limit=limit)
        batches = BatchAnswerer(answerer, None, on_gpu)
        for plan in planned:
            _answer(plan, batches, PredictionStore(out / PREDICTIONS, plan.task.name))
        return {result.name: {"score": result.score, "n": result.n} for result in score_run(planned, out)}


def _answer(plan: PlannedTask, batches: BatchAnswerer, store: PredictionStore) -> None:
    batches.run(plan.waiting, plan.task.longest_answer("unimoe"), lambda predictions: store.append(predictions, 0))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the documentation."""
    tasks = list(rows[0]["scores"])
    head = ["held", "memory, MiB", "of it decoder layers", "on disk, MiB", "tokens/s"]
    lines = [[*head, *(task.removeprefix("starter_").replace("_", " ") for task in tasks)]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for row in rows:
        sizes = [f"{row[name]:.1f}" for name in ("memory_mib", "decoder_layers_mib", "disk_mib", "tokens_per_second")]
        lines.append([row["way"], *sizes, *(f"{row['scores'][task]['score']:.1f}" for task in tasks)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
