"""What report.md says of a private run, limits first."""

from __future__ import annotations

from lora_runtime.train.private.settings import PrivacyBudget


def privacy_section(budget: PrivacyBudget) -> str:
    """Markdown: the guarantee, what it follows from, and what it leaves out."""
    rows = (
        ("ε", f"{budget.epsilon:.4g}"),
        ("δ", f"{budget.delta:.3g}"),
        ("noise multiplier σ", f"{budget.noise_multiplier:.4g}"),
        ("norm that a row's gradient is cut to", f"{budget.max_grad_norm:g}"),
        ("sampling", f"Poisson, each of {budget.num_rows:,} rows with probability {budget.sample_rate:.4g} a step"),
        ("expected rows of a step", f"{budget.expected_batch_size:.4g}"),
        ("steps", f"{budget.num_steps:,}"),
        ("mechanism", "DP-SGD through Opacus; Rényi accountant, an upper bound"),
    )
    table = "\n".join(("| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)))
    warning = "" if budget.warning is None else f"**Warning**: {budget.warning}.\n\n"
    return (
        f"{warning}The adapter's weights are (ε, δ)-differentially private in the training rows: adding or removing one"
        f" row changes what is likely by no more than that.\n\n{table}\n\nNot covered:\n\n"
        "- The validation rows. The kept pass, and an early stop or a lower learning rate if they were asked for, were"
        " chosen by them, and their metrics are exact; so are those in `multilora.json`. Give rows that may be known"
        " with `--valid`, or count these as disclosed.\n"
        "- This report: its losses, metrics and numbers of rows are exact. Give away the adapter, not the report.\n"
        "- The labels' names and the number of rows, which count as public, and the base, which training did not"
        " change.\n"
        "- Somebody with several rows, who is protected less: by k·ε for k rows.\n"
        "- Other runs on the same rows: each spends its own ε, those whose result was thrown away too."
    )
