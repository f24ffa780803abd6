"""What watching the routers costs: a training step of the quickstart's model with and without telemetry.

    python benchmarks/telemetry_cost.py

Both kinds of steps alternate in one process; CPU time of the thread counts, so that other load hardly matters.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from unimoe import UniMoeConfig, UniMoeForCausalLM, UniMoeTextConfig
from unimoe.trainers.collapse import WINDOW, CollapseWatch
from unimoe.trainers.routing_figures import ExpertLoad
from unimoe.trainers.routing_statistics import RoutingRecorder

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs=2, default=(32, 40), metavar=("B", "S"))
    parser.add_argument("--steps", type=int, default=30, help="of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = quickstart_model(args.hidden, args.layers, args.experts)
    recorder = RoutingRecorder(model, in_training_only=True)
    watch = CollapseWatch(model.config.text_config)
    ids = torch.randint(8, 1448, tuple(args.batch))
    mask = torch.ones_like(ids)

    def step() -> None:
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        model.zero_grad()

    seen = 0

    def watched_step() -> None:
        nonlocal seen
        recorder.attach()
        step()
        seen += 1
        if seen % WINDOW == 0:
            watch.look(recorder.counts.read(only=CollapseWatch.NEEDS))
        if seen % LOG_EVERY == 0:
            counts = recorder.counts.read()
            load = ExpertLoad.of(model.config.text_config, counts.tokens_NM[0], counts.chosen_NLMX[0])
            _ = load.layer_entropies, load.max_ratios, load.dead
        recorder.detach()

    plain, watched = [], []
    for index in range(args.steps + 2):
        for kind, times in ((step, plain), (watched_step, watched)):
            seconds = _cpu_seconds(kind)
            if index > 1:  # the first ones build kernels
                times.append(seconds)
    differences = [b - a for a, b in zip(plain, watched, strict=True)]
    base = statistics.median(plain)
    print(
        f"step {1e3 * base:.1f} ms of CPU time; telemetry {1e3 * statistics.median(differences):+.2f} ms (median of "
        f"{args.steps} pairs), {100 * statistics.median(differences) / base:+.2f} %"
    )
    print(
        f"counting alone: {1e3 * _counting(recorder, model, ids, mask):.2f} ms, {100 * _counting(recorder, model, ids, mask) / base:.2f} %"
    )


def _counting(recorder: RoutingRecorder, model: UniMoeForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """The least time of what the hooks do after one forward pass."""
    recorder.attach()
    kept: list[tuple] = []
    count, recorder._count = recorder._count, lambda *given: kept.append(given)  # type: ignore[method-assign]
    model(ids, attention_mask=mask)
    recorder._count = count  # type: ignore[method-assign]
    recorder.detach()
    with torch.no_grad():
        return min(_cpu_seconds(lambda: count(*kept[0])) for _ in range(20))


def _cpu_seconds(work: Callable[[], None]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


if __name__ == "__main__":
    main()
