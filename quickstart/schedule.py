"""How a run's minutes are spent, and the plan that is shown before it starts."""

from dataclasses import dataclass

from ..errors import RecipeError

# The minutes that Budget()'s steps are made for.
REFERENCE_MINUTES = 13.0

# Seconds that do not depend on the training budget: imports, parts, towers, evaluation, saving.
FIXED_SECONDS = {"parts": 40.0, "towers": 120.0, "evaluation": 60.0}
# Shares of the remaining time.
SHARES = {"stage0": 0.13, "stage1": 0.27, "stage2": 0.16, "stage3": 0.44}
# Steps of each expert's run in units of the budget's: motion is what the dense decoder cannot see without it.
EXPERT_EFFORT = {"image": 1.0, "speech": 0.5, "sound": 0.5, "video_text": 5.0}
# Of stage 2, for its longest run.
LONGEST_EXPERT = max(EXPERT_EFFORT.values()) / sum(EXPERT_EFFORT.values())
SHORTEST_MINUTES, LONGEST_MINUTES = 5.0, 60.0 * 24 * 30


@dataclass(frozen=True)
class Budget:
    """Steps of each stage, and the seconds after which a slow machine cuts a stage short (None: never)."""

    language: int = 400
    connectors: int = 900
    expert: int = 80
    mixed: int = 800
    seconds: dict[str, float] | None = None

    def scaled(self, factor: float, seconds: dict[str, float] | None = None) -> "Budget":
        def scale(steps: int) -> int:
            return max(1, round(steps * factor))

        return Budget(
            scale(self.language),
            scale(self.connectors),
            scale(self.expert),
            scale(self.mixed),
            seconds or self.seconds,
        )

    def limit(self, stage: str) -> float | None:
        return None if self.seconds is None else self.seconds[stage]


def budget_for(minutes: float) -> Budget:
    """Steps in proportion to the minutes, and a time limit per stage for machines slower than the reference.

    Raises:
        RecipeError: fewer minutes than a run can take at all, or no number.
    """
    if not SHORTEST_MINUTES <= minutes <= LONGEST_MINUTES:
        raise RecipeError(
            f"--minutes is {minutes:g}; give between {SHORTEST_MINUTES:g}, of which training gets little more than one, "
            f"and {LONGEST_MINUTES:g}."
        )
    fixed = sum(FIXED_SECONDS.values())
    reference = 60 * REFERENCE_MINUTES - fixed
    training = 60 * minutes - fixed
    limits = {stage: share * training for stage, share in SHARES.items()}
    limits["stage2"] *= LONGEST_EXPERT
    return Budget().scaled(training / reference, limits)


def print_plan(budget: Budget, teach_language: bool) -> None:
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
        ("stage 2", f"{expert_steps} steps in all: {len(EXPERT_EFFORT)} experts, one after the other", expert_seconds),
        (
            "stage 3",
            f"{budget.mixed} steps: router, connectors, LoRA on experts and attention",
            budget.limit("stage3"),
        ),
        ("result", "held-out answers, probes, model folder, report", FIXED_SECONDS["evaluation"]),
    ]
    total = sum(seconds for *_, seconds in rows) / 60
    print(f"Plan, at most about {total:.0f} minutes; a slower machine trains fewer steps:")
    for name, what, seconds in rows:
        print(f"  {name:17s} {what:68s} {seconds:4.0f} s")
    print(flush=True)
