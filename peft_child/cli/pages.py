"""What `--html` shows: settings and sizes of adapters, where their child networks are, and how large their deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from peft_child.card.charts import child_network_chart, delta_chart, overlap_chart
from peft_child.card.delta_counts import DeltaCounts, count_deltas
from peft_child.card.page import Section, write_page
from peft_child.cli.summary import Counted, summarize
from peft_child.files.adapter_folder import SparseAdapter
from peft_child.tensors.delta import Overlap, Progress, silent


Overlaps = Mapping[tuple[int, int], Mapping[str, Overlap]]  # what `compare_adapters` finds


def write_adapters_page(
    path: str | Path,
    title: str,
    names: Sequence[str],
    adapters: Sequence[SparseAdapter],
    overlaps: Overlaps | None = None,
    progress: Progress = silent,
) -> None:
    """Write what adapters hold, and how their child networks overlap, as one page of HTML that needs no network.

    Equal adapters of equal names make equal files. The deltas are read one tensor at a time.

    Args:
        path: The file to write.
        title: Of the page.
        names: What the page calls the adapters; a single one needs no name.
        adapters: The adapters, each with a child network.
        overlaps: For several adapters, what `compare_adapters` has found.
        progress: Wraps the loops over tensor names.

    Raises:
        ImportError: If plotly is not installed.
        ValueError: If an adapter has no child network.
    """
    empty = [name for name, adapter in zip(names, adapters, strict=True) if not adapter.sizes]
    if empty:
        raise ValueError(f"A page shows adapters with a child network; '{empty[0]}' has none.")
    counts = [count_deltas(adapter.deltas, progress) for adapter in adapters]
    sections = [Section("Settings and sizes", table=_facts(names, adapters, counts))]
    for (first, second), by_name in (overlaps or {}).items():
        sections.append(_shared(names[first], names[second], by_name))
    for name, adapter, found in zip(names, adapters, counts, strict=True):
        of_adapter = f" of {name}" if len(names) > 1 else ""
        sections += [_network(of_adapter, adapter, found), _histogram(of_adapter, found)]
    write_page(path, title, sections)


def _facts(
    names: Sequence[str], adapters: Sequence[SparseAdapter], counts: Sequence[DeltaCounts]
) -> list[tuple[str, ...]]:
    """A row for each fact and a column for each adapter."""
    columns = [
        {"adapter": name, **_settings(adapter), **_sizes(summarize(adapter).total, found), **_whole(adapter)}
        for name, adapter, found in zip(names, adapters, counts, strict=True)
    ]
    facts = [(fact, *(column[fact] for column in columns)) for fact in columns[0]]
    return facts if len(names) > 1 else facts[1:]


def _settings(adapter: SparseAdapter) -> dict[str, str]:
    def shown(key: str) -> str:
        return str(adapter.settings.get(key, "not recorded"))

    revision = adapter.settings.get("revision")
    return {
        "base model": shown("base_model_name_or_path") + (f", revision {revision}" if revision else ""),
        "variant": shown("variant"),
        "granularity": shown("granularity"),
        "density that was set": shown("density"),
    }


def _sizes(total: Counted, counts: DeltaCounts) -> dict[str, str]:
    return {
        "tensors with a child network": f"{total.tensors:,}",
        "chosen entries": f"{total.chosen:,} of {total.numel:,} in these tensors ({total.density:.3%})",
        "positions": f"{total.index_bytes:,} bytes",
        "deltas": f"{total.delta_bytes:,} bytes, {total.dtype}",
        "deltas that are zero": f"{counts.zeros:,}",
        "L2 norm of the deltas": f"{total.norm:.4g}",
    }


def _whole(adapter: SparseAdapter) -> dict[str, str]:
    size = sum(tensor.nbytes for tensor in adapter.dense.values())
    return {"tensors saved whole": f"{len(adapter.dense):,}, {size:,} bytes" if adapter.dense else "none"}


def _network(of_adapter: str, adapter: SparseAdapter, counts: DeltaCounts) -> Section:
    return Section(
        f"Where the child network{of_adapter} is",
        "The share of the targeted entries that are chosen, by layer and module. Grey: nothing is chosen there.",
        chart=child_network_chart(adapter.sizes, counts.sums),
    )


def _histogram(of_adapter: str, counts: DeltaCounts) -> Section:
    title = f"How large the deltas{of_adapter} are"
    if not counts.decreases and not counts.increases:
        return Section(title, "All deltas are zero.")
    text = "A delta is added to a weight of the base model. There are ten ranges in every factor of ten."
    zeros = f" {counts.zeros:,} deltas are zero, and not shown." if counts.zeros else ""
    return Section(title, text + zeros, chart=delta_chart(counts))


def _shared(first: str, second: str, by_name: Mapping[str, Overlap]) -> Section:
    total = sum(by_name.values(), start=Overlap(0, 0, 0, 0))
    either = total.first + total.second - total.shared
    return Section(
        f"What {first} and {second} share",
        f"Of the {either:,} entries that either has chosen, both have {total.shared:,} ({total.jaccard:.2%}, the "
        f"Jaccard index). That is {total.over_chance:.3g} times as many as two random child networks would share. "
        "Grey: neither has chosen anything there.",
        chart=overlap_chart(by_name),
    )
