"""Any sweep file gives one clear error or a complete plan. WORKBENCH_FUZZ sets the number of files."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from helpers import ablation_fields
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from workbench.ablation.arms import resolve
from workbench.ablation.spec.ablation import AblationConfig
from workbench.config import ConfigError, expand_dotted

EXAMPLES = int(os.environ.get("WORKBENCH_FUZZ", "80"))

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**40, 10**400, -0.0, 1e-320, 1e308, 0.5, 1e-3]),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["", "full", "sliding", "wsd", "0", "kind", "é", "\x00", "a/b", "../x"]),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=6,
)
RANGES = st.fixed_dictionaries(
    {},
    optional={
        "values": st.lists(st.sampled_from([1e-3, 2e-3, 1, 2, 4, 8, True, "wsd", math.nan, math.inf]), max_size=4),
        "low": st.sampled_from([1e-4, 0, 1, -1, 2, math.nan, -math.inf, 10**400]),
        "high": st.sampled_from([1e-2, 1, 8, 8.0, 1e308, math.inf, math.nan]),
        "log": st.booleans(),
    },
)
FIELDS = [
    "training.learning_rate",
    "training.weight_decay",
    "training.batch_size",
    "training.schedule",
    "training.clip",
    "training.warmup",
    "training.tokens",
    "training.optimiser.betas",
    "model.width",
    "model.depth",
    "model.pattern",
    "model.at",
    "model.mixers.full.heads",
    "model.mixers.sliding.window",
    "model.feedforwards.swiglu.hidden",
    "data.kind",
    "data.corpus.kind",
    "seed",
    "data.seed",
    "start.folder",
    "training",
    "model",
    "nothing.at.all",
    "",
]
SPACES = st.dictionaries(st.sampled_from(FIELDS), RANGES, max_size=3)
TUNING = st.fixed_dictionaries(
    {},
    optional={
        "trials": st.sampled_from([0, 1, 2, 3, 4, 6, -1, 10**9, 2.0, "3", None]),
        "sampler": st.sampled_from(["grid", "random", "qmc", "tpe", "gp", "cmaes", "TPE", None]),
        "sampler_seed": st.sampled_from([0, 1, -1, 2**31, 2**64, 1.5]),
        "space": SPACES | JUNK,
        "variants": st.booleans(),
        "startup_trials": st.sampled_from([1, 2, 9, 0]),
        "pruner": st.sampled_from(["none", "median", "hyperband", "x"]),
        "enqueue": st.lists(st.dictionaries(st.sampled_from(FIELDS), SCALARS, max_size=2), max_size=3) | JUNK,
        "warm_start": st.lists(st.text(max_size=4), max_size=2),
        "seed": st.integers(-2, 3) | st.just(2**70),
    },
)
ARM = st.dictionaries(st.sampled_from(FIELDS), SCALARS | st.integers(1, 64) | JUNK, max_size=3)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["a", "a b", "", ".", "..", "a/b", "é", "x" * 300]) | SCALARS,
        "arms": st.dictionaries(
            st.sampled_from(["full", "b", "", "a/b", "\n", "1", "baseline"]) | st.integers(0, 2), ARM, max_size=3
        )
        | JUNK,
        "base": JUNK,
        "tuning": TUNING | JUNK,
        "baseline": st.sampled_from(["full", "sliding", "none", "", 0]),
        "confirmation": st.fixed_dictionaries({"seeds": st.lists(st.integers(-1, 4) | SCALARS, max_size=4)}) | JUNK,
        "alpha": SCALARS,
        "margin": SCALARS,
        "question": SCALARS,
        "exploratory": SCALARS,
        "budget": JUNK | st.fixed_dictionaries({"axis": st.sampled_from(["flops", "seconds", "parameters", "x"])}),
        "launch": JUNK
        | st.fixed_dictionaries(
            {},
            optional={
                "workers": SCALARS,
                "heartbeat": SCALARS,
                "storage": SCALARS | st.just("postgresql://h/d"),
                "launcher": st.sampled_from(["local", "slurm", "ray", "x"]) | JUNK,
            },
        ),
        "nonsense": JUNK,
    },
)
# a search that is nearly right: what gets past the first checks
GOOD = st.sampled_from(
    [
        {"low": 1e-4, "high": 1e-2, "log": True},
        {"low": 0.25, "high": 1},
        {"low": 1, "high": 8},
        {"values": [1, 2]},
        {"low": 16, "high": 64, "log": True},
        {"values": [0.5]},
        {"low": 5e-324, "high": 1e308, "log": True},
        {"low": 0, "high": 10**25},
    ]
)
SEARCHES = st.fixed_dictionaries(
    {
        "tuning": st.fixed_dictionaries(
            {
                "trials": st.integers(0, 6),
                "sampler": st.sampled_from(["random", "qmc", "tpe", "gp", "grid"]),
                "space": st.dictionaries(
                    st.sampled_from(FIELDS[:2] + FIELDS[4:6] + FIELDS[8:15]),
                    GOOD | GOOD | GOOD | RANGES,
                    min_size=1,
                    max_size=2,
                ),
            },
            optional={
                "variants": st.booleans(),
                "startup_trials": st.integers(1, 9),
                "sampler_seed": st.sampled_from([0, 1, 2**31, 2**32 - 1]),
                "enqueue": st.lists(st.dictionaries(st.sampled_from(FIELDS[:6]), SCALARS, max_size=2), max_size=2),
            },
        )
    }
)
OVERRIDES = st.dictionaries(st.sampled_from(FIELDS), SCALARS | JUNK, max_size=2)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(CHANGES | SEARCHES | SEARCHES, OVERRIDES, st.booleans())
def test_every_sweep_file_is_a_clear_error_or_a_complete_plan(
    changes: dict[str, Any], base: dict[str, Any], mild: bool
) -> None:
    fields = ablation_fields(Path("nowhere"), tuning={"trials": 2, "sampler": "random"})
    if mild:  # one part wrong at most, so that more files get past the first check
        changes = dict(list(changes.items())[:1])
    fields = {**fields, **changes}
    if base and not mild and "base" not in changes:
        fields["base"] = {**fields["base"], **base}
    try:
        config = AblationConfig.parse(fields)
        arms = resolve(config)
    except ConfigError as error:
        assert error.problems and all(problem.got and problem.expected for problem in error.problems)
        assert "Traceback" not in str(error)
        event("error")
        return
    event("plan")
    for arm in arms.values():
        assert len(arm.points) == config.tuning.trials
        for point in arm.points:
            assert set(point) <= set(arm.space)
            assert all(value in arm.space[name] for name, value in point.items())
            arm.run(hyperparameters=point)
    again = AblationConfig.parse(config.plain())
    assert again.identity == config.identity and again.order == config.order
    assert expand_dotted(config.plain()) is not None
