"""The types of these packages are checked while the tests run; their import comes after this file."""

from beartype.claw import beartype_packages

# Shapes need jaxtyping, which takes ten times as long: `pyproject.toml` lists where there are any.
beartype_packages(
    [
        "affectlens.drift.torch_engine",
        *(
            f"affectlens.{name}"
            for name in ("effects", "interventions", "lens", "probes", "tasks", "writing")
        ),
    ]
)
