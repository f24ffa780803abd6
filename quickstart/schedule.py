"""How a run's minutes are spent, and the plan that is shown before it starts."""

from ..errors import RecipeError
from .stages import EXPERT_EFFORT, EXPERTS, Budget

# Seconds that do not depend on the training budget: imports, parts, towers, evaluation, saving.
FIXED_SECONDS = {"parts": 40.0, "towers": 120.0, "evaluation": 60.0}
# Shares of the remaining time.
SHARES = {"stage0": 0.13, "stage1": 0.27, "stage2": 0.16, "stage3": 0.44}
# Of stage 2, for its longest run.
LONGEST_EXPERT = max(EXPERT_EFFORT.values()) / sum(EXPERT_EFFORT.values())
SHORTEST_MINUTES = 1.0


def budget_for(minutes: float, reference_minutes: float) -> Budget:
    """Steps in proportion to the minutes, and a time limit per stage for machines slower than the reference.

    Raises:
        RecipeError: fewer minutes than a run can take at all.
    """
    if not minutes >= SHORTEST_MINUTES:
        raise RecipeError(f"--minutes is {minutes:g}; give at least {SHORTEST_MINUTES:g}.")
    fixed = sum(FIXED_SECONDS.values())
    reference = 60 * reference_minutes - fixed
    training = max(60 * minutes - fixed, 0.25 * 60 * minutes)
    limits = {stage: share * training for stage, share in SHARES.items()}
    limits["stage2"] *= LONGEST_EXPERT
    return Budget().scaled(training / reference, limits)


def print_plan(minutes: float, budget: Budget, teach_language: bool) -> None:
    """What will happen and how long each step may take."""
    rows = [
        ("parts and corpus", "find or download the encoders, check the corpus", FIXED_SECONDS["parts"]),
        ("tower states", "the frozen encoders see and hear everything once", FIXED_SECONDS["towers"]),
    ]
    if teach_language:
        what = f"{budget.language} steps: a compact decoder learns the corpus's English"
        rows.append(("stage 0", what, budget.limit("stage0")))
    expert_steps = round(budget.expert * sum(EXPERT_EFFORT.values()))
    expert_seconds = budget.limit("stage2") / LONGEST_EXPERT
    rows += [
        ("stage 1", f"{budget.connectors} steps: the connectors learn to speak to it", budget.limit("stage1")),
        ("stage 2", f"{expert_steps} steps in all: {len(EXPERTS)} experts, one after the other", expert_seconds),
        (
            "stage 3",
            f"{budget.mixed} steps: router, connectors, LoRA on experts and attention",
            budget.limit("stage3"),
        ),
        ("result", "held-out answers, probes, model folder, report", FIXED_SECONDS["evaluation"]),
    ]
    print(f"Plan, at most about {minutes:g} minutes; a slower machine trains fewer steps:")
    for name, what, seconds in rows:
        print(f"  {name:17s} {what:68s} {seconds:4.0f} s")
    print(flush=True)
