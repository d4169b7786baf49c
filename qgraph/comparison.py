"""Several artifacts of one model beside each other: what each is, saves and costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import qgraph.ir
from qgraph.artifact import Artifact, open_artifact
from qgraph.errors import UserError
from qgraph.feeds import signature
from qgraph.loading import Data, source_facts
from qgraph.pipeline import Context, Feeds
from qgraph.report.data import deployable_bytes, target_text
from qgraph.report.side_by_side import Contender, SideBySide
from qgraph.runtime.benchmark import Benchmark, compare
from qgraph.runtime.figures import Verification
from qgraph.runtime.placement import kernel_counts
from qgraph.runtime.session import TensorSpec, open_session, random_feeds

__all__ = ["compare_artifacts", "contender", "refuse_existing_page", "write_page"]

_SOURCE = "source"
_FEEDS = 16


def compare_artifacts(
    artifacts: Sequence[str | Path],
    *,
    bench: bool = False,
    data: Data | str | Path | Iterable[Feeds] | None = None,
    seconds: float = 5.0,
    context: Context | None = None,
) -> SideBySide:
    """Put artifacts of one model beside each other.

    Args:
        artifacts: their folders, at least two.
        bench: time all of them in turn, now and here, with the source if it lies beside one of them; otherwise the
            figures of each one's own bench.json are shown.
        data: samples to time on; random ones when None.
        seconds: about how long timing may take.
        context: seed and threads.

    Raises:
        UserError: there are fewer than two, one comes twice, one is no artifact or damaged, they were compiled from
            different models, or one does not run here.
    """
    if len(artifacts) < 2:
        raise UserError("there is nothing to compare: name two artifacts or more")
    opened = [open_artifact(path) for path in artifacts]
    _refuse_twice(opened)
    _refuse_strangers(opened)
    timed = _timed(opened, data, seconds, context or Context()) if bench else None
    source = opened[0].manifest["source"]
    contenders = [contender(one, label, timed) for one, label in zip(opened, _labels(opened), strict=True)]
    before = timed is not None and any(one.name == _SOURCE for one in timed.candidates)
    return SideBySide(
        source=str(source["name"]),
        source_bytes=int(source["bytes"]),
        sha256=str(source["sha256"]),
        contenders=tuple(contenders),
        source_seconds=timed[_SOURCE].seconds if timed is not None and before else None,
        benchmark=None if timed is None else timed.to_json(),
    )


def _refuse_twice(opened: Sequence[Artifact]) -> None:
    seen: dict[Path, Path] = {}
    for one in opened:
        place = one.path.resolve()
        if place in seen:
            raise UserError(f"{one.path} comes twice: name every artifact once")
        seen[place] = one.path


def _refuse_strangers(opened: Sequence[Artifact]) -> None:
    """Raise a UserError that names the artifact of another model: one that is in the minority, or the later of two."""
    hashes = Counter(str(one.manifest["source"].get("sha256")) for one in opened)
    usual = hashes.most_common(1)[0][0]
    for one in opened:
        source = one.manifest["source"]
        if str(source.get("sha256")) != usual:
            other = next(two for two in opened if str(two.manifest["source"].get("sha256")) == usual)
            same = source["name"] == other.manifest["source"]["name"]
            model = "another version of it" if same else f"'{source['name']}'"
            raise UserError(
                f"{one.path} was compiled from {model}, and {other.path} from '{other.manifest['source']['name']}': "
                "only artifacts of one model can be compared"
            )


def _labels(opened: Sequence[Artifact]) -> list[str]:
    """Return the folders' names; with those of the folders above as far as names repeat."""
    paths = [one.path.resolve() for one in opened]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _timed(
    opened: Sequence[Artifact], data: Data | str | Path | Iterable[Feeds] | None, seconds: float, context: Context
) -> Benchmark:
    sessions = {label: one.session(threads=context.threads) for label, one in zip(_labels(opened), opened, strict=True)}
    source = _source_beside(opened)
    if source is not None:
        sessions = {_SOURCE: open_session(source, threads=context.threads), **sessions}
    return compare(sessions, _feeds(opened[0], data, context.seed), seconds=seconds, threads=context.threads)


def _source_beside(opened: Sequence[Artifact]) -> Path | None:
    for one in opened:
        facts = one.manifest["source"]
        path = one.path.resolve().parent / str(facts["name"])
        if path.is_file() and source_facts(path, qgraph.ir.load(path))["sha256"] == facts["sha256"]:
            return path
    return None


def _feeds(artifact: Artifact, data: Data | str | Path | Iterable[Feeds] | None, seed: int) -> list[Feeds]:
    if data is None:
        return random_feeds([TensorSpec(**one) for one in artifact.manifest["inputs"]], seed)
    model = artifact.path / "model.onnx"
    if not model.is_file():
        raise UserError(f"{artifact.path} holds no model.onnx that tells how samples are read: leave --data out")
    samples = Data.of(data).open(signature(qgraph.ir.load(model)))
    return [feed for feed, _ in zip(iter(samples), range(_FEEDS), strict=False)]


def contender(artifact: Artifact, label: str, timed: Benchmark | None) -> Contender:
    """Return the figures of an artifact, with its timing of `timed`, or its own where that is None.

    Raises:
        UserError: its manifest or bench.json is damaged.
    """
    manifest = artifact.manifest
    seconds, speedup = _speed(artifact, label, timed)
    try:
        told = manifest.get("verification")
        verification = Verification.from_json(told) if told else None
        pipeline = str(manifest.get("pipeline", {}).get("compress", ""))
        kernels = {name: sum(counts.values()) for name, counts in kernel_counts(manifest).items()}
        left = len(manifest.get("skipped", ())) + len((manifest.get("kernels") or {}).get("left_in_float", ()))
        size = deployable_bytes(manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{artifact.path}/manifest.json is damaged: {type(error).__name__}: {error}") from None
    agreements = [] if verification is None else [one.top1_agreement for one in verification.outputs]
    rated = [one for one in agreements if one is not None]
    worst = None if verification is None else verification.worst
    infinite = worst is not None and worst.sqnr_db == math.inf
    return Contender(
        label=label,
        path=str(artifact.path),
        target=target_text(manifest),
        pipeline=pipeline,
        verified=artifact.verified,
        bytes=size,
        seconds=seconds,
        speedup=speedup,
        sqnr_db=None if worst is None or infinite else worst.sqnr_db,
        exact=infinite and verification is not None and all(one.exact for one in verification.outputs),
        cosine=None if worst is None else worst.cosine,
        agreement=min(rated, default=None),
        accuracy_before=None if verification is None else verification.accuracy_before,
        accuracy=None if verification is None else verification.accuracy_after,
        own_measure=None if verification is None else verification.eval_after,
        samples=0 if verification is None else verification.samples,
        data="" if not told else str(told.get("data", "")),
        kernels=kernels,
        left_alone=left,
    )


def _speed(artifact: Artifact, label: str, timed: Benchmark | None) -> tuple[float | None, float | None]:
    """Return the latency, and how many times faster than the source that is, both of one run."""
    if timed is not None:
        names = [one.name for one in timed.candidates]
        return timed[label].seconds, timed.ratio(_SOURCE, label) if _SOURCE in names else None
    bench = artifact.report.bench
    if not bench or "candidates" not in bench:
        return None, None
    try:
        kept = Benchmark.from_json(bench)
        return kept["after"].seconds, kept.ratio("before", "after")
    except (KeyError, TypeError, AttributeError, StopIteration, ZeroDivisionError) as error:
        raise UserError(f"{artifact.path}/bench.json is damaged: {type(error).__name__}: {error}") from None


def refuse_existing_page(path: Path, *, force: bool) -> None:
    """Raise a UserError when `path` exists and may not be replaced."""
    if path.is_dir():
        raise UserError(f"{path} is a folder. Name the page itself with -o, such as {path / 'compare.html'}.")
    if path.exists() and not force:
        raise UserError(f"{path} exists. Pass --force to replace it, or another file with -o.")


def write_page(page: str, path: Path) -> None:
    """Write a page.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}. Choose another file with -o.") from None
