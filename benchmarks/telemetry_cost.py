"""What watching the routers costs, as a share of a forward and backward pass of a model of the quickstart's size.

    python benchmarks/telemetry_cost.py

Medians of CPU time of one thread, so that other load matters little. The parts are timed apart: their sum is smaller than
the noise of whole steps.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from unimoe import UniMoeConfig, UniMoeForCausalLM, UniMoeTextConfig
from unimoe.trainers.telemetry.collapse import WINDOW, CollapseWatch
from unimoe.trainers.telemetry.routing_figures import ExpertLoad
from unimoe.trainers.telemetry.routing_statistics import RoutingRecorder

LOG_EVERY = 10


def quickstart_model(hidden: int, layers: int, experts: int) -> UniMoeForCausalLM:
    """A decoder of the quickstart's shape, with random weights and no towers."""
    text = UniMoeTextConfig(
        vocab_size=1448,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=experts,
        sparse_layers=list(range(1, layers, 2)),
        router_aux_loss_coef=0.002,
    )
    torch.manual_seed(0)
    return UniMoeForCausalLM(UniMoeConfig(text_config=text)).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs=2, default=(32, 40), metavar=("B", "S"))
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = quickstart_model(args.hidden, args.layers, args.experts)
    config = model.config.text_config
    recorder, watch = RoutingRecorder(model, in_training_only=True), CollapseWatch(config)
    ids = torch.randint(8, 1448, tuple(args.batch))
    mask = torch.ones_like(ids)

    def step() -> None:
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        model.zero_grad()

    count = _kept_call(recorder, step)

    def look() -> None:
        watch.look(recorder.counts.read(only=CollapseWatch.NEEDS))

    def log() -> None:
        counts = recorder.counts.read()
        load = ExpertLoad.of(config, counts.tokens_NM[0], counts.chosen_NLMX[0])
        _ = load.layer_entropies, load.max_ratios, load.dead

    step()  # builds kernels
    base = statistics.median(_cpu_seconds(step) for _ in range(args.steps))
    with torch.no_grad():
        parts = {name: _typical(work) for name, work in (("count", count), ("look", look), ("log", log))}
    total = parts["count"] + parts["look"] / WINDOW + parts["log"] / LOG_EVERY
    print(f"forward and backward: {1e3 * base:.1f} ms of CPU time")
    print(f"counting, every step: {1e3 * parts['count']:.2f} ms")
    print(
        f"alarm, every {WINDOW} steps: {1e3 * parts['look']:.2f} ms; figures, every {LOG_EVERY}: {1e3 * parts['log']:.2f} ms"
    )
    print(f"per step {1e3 * total:.2f} ms: {100 * total / base:.2f} %")


def _kept_call(recorder: RoutingRecorder, step: Callable[[], None]) -> Callable[[], None]:
    """What the hooks do after a forward pass, to be done again."""
    kept: list[tuple] = []
    count, recorder._count = recorder._count, lambda *given: kept.append(given)  # type: ignore[method-assign]
    with recorder:
        step()
    return lambda: count(*kept[0])


def _typical(work: Callable[[], None]) -> float:
    return statistics.median(_cpu_seconds(work) for _ in range(40))


def _cpu_seconds(work: Callable[[], None]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


if __name__ == "__main__":
    main()
