"""Test-retest reliability: agreement of repeated trainings on the test images, NODE-ACA against ResNet.

Every training starts from other weights and sees other batches. The intraclass correlation of Shrout & Fleiss (Psychol.
Bull. 86, 1979) measures the agreement of their answers, with test images as targets and trainings as judges. Net, data
and training are those of ``image``. If nearly every image is classified right, few images determine the agreement in
right and wrong, and its interval is wide; the probability of the true class uses all images.
"""

from statistics import median
from typing import Any

import numpy as np

from benchmarks.harness import new_figure
from benchmarks.paper.cifar import Images
from benchmarks.paper.common import Progress, Report, Settings, Table, bar, save_figure
from benchmarks.paper.image import ACA, RESNET, Training, final_error, repeatable, seed_of, trained

MEASURES = {"correct": "right or wrong", "probability": "probability of the true class"}
RESAMPLES = 1000


def run(settings: Settings) -> Report:
    images, training, repeats = Images.at(settings), Training.at(settings), settings.pick(3, 10, 10)
    models = (RESNET, ACA)
    progress = Progress(settings, "retest", {"images": images.name, "training": str(training), "repeats": repeats})
    results: dict[str, list[dict[str, Any]]] = {model.name: [] for model in models}
    with bar(training.epochs * len(models) * repeats, "retest") as ticks, repeatable(settings):
        for i in range(repeats):
            for model in models:
                results[model.name].append(
                    trained(model, seed_of(settings, i), images, training, settings, progress, ticks.update)
                )
    scores = {
        measure: {name: np.stack([r[measure].numpy() for r in runs], 1) for name, runs in results.items()}
        for measure in MEASURES
    }
    reliability = {measure: _reliability(scores[measure], settings.seed) for measure in MEASURES}
    tables = [_table(images, results, scores, reliability), _differences(reliability)]
    figure = _draw(settings, scores, reliability)
    progress.done()
    counts = {name: np.bincount(x.sum(1), minlength=repeats + 1).tolist() for name, x in scores["correct"].items()}
    return Report("retest", tables, [figure], {"training": str(training), "images by times right": counts})


def intraclass_correlations(scores: np.ndarray) -> dict[str, float]:
    """The six correlations of Shrout & Fleiss for ``scores`` (n targets, k judges), by name; NaN if nothing varies.

    ICC(1,.): each target has its own judges; ICC(2,.): the judges are a sample; ICC(3,.): they are all there are.
    (.,1): reliability of one judge's score; (.,k): of the mean of k.
    """
    x = np.asarray(scores, dtype=np.float64)
    n, k = x.shape
    deviation = x - x.mean()
    targets, judges = deviation.mean(1), deviation.mean(0)
    within = ((deviation - targets[:, None]) ** 2).sum()
    between_judges = n * (judges**2).sum()
    bms = k * (targets**2).sum() / (n - 1)
    wms = within / (n * (k - 1))
    jms = between_judges / (k - 1)
    ems = ((deviation - targets[:, None] - judges) ** 2).sum() / ((n - 1) * (k - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "ICC(1,1)": float(np.divide(bms - wms, bms + (k - 1) * wms)),
            "ICC(2,1)": float(np.divide(bms - ems, bms + (k - 1) * ems + k * (jms - ems) / n)),
            "ICC(3,1)": float(np.divide(bms - ems, bms + (k - 1) * ems)),
            "ICC(1,k)": float(np.divide(bms - wms, bms)),
            "ICC(2,k)": float(np.divide(bms - ems, bms + (jms - ems) / n)),
            "ICC(3,k)": float(np.divide(bms - ems, bms)),
        }


def _reliability(scores: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """ICCs by model, and samples of ICC(2,1) by model over resampled test images, the same images for both models."""
    random = np.random.default_rng(seed)
    n = len(next(iter(scores.values())))
    chosen = [random.integers(0, n, n) for _ in range(RESAMPLES)]
    samples = {
        name: np.array([intraclass_correlations(x[rows])["ICC(2,1)"] for rows in chosen]) for name, x in scores.items()
    }
    return {"icc": {name: intraclass_correlations(x) for name, x in scores.items()}, "samples": samples}


def _interval(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(samples, (2.5, 97.5)) if np.isfinite(samples).any() else (np.nan, np.nan)
    return float(low), float(high)


def _table(images: Images, results: dict, scores: dict, reliability: dict) -> Table:
    rows = []
    for measure, label in MEASURES.items():
        for name, x in scores[measure].items():
            icc = reliability[measure]["icc"][name]
            low, high = _interval(reliability[measure]["samples"][name])
            error = median(final_error(run) for run in results[name])
            others = (f"{icc[key]:.3f}" for key in ("ICC(3,1)", "ICC(2,k)", "ICC(3,k)"))
            one = f"{icc['ICC(2,1)']:.3f}"
            rows.append((label, name, x.shape[1], f"{error:.2f}", one, f"{low:.3f} to {high:.3f}", *others))
    return Table(
        f"{images.name}: agreement of repeated trainings on {len(images.test[1])} test images",
        ("score", "model", "runs", "error % (median)", "ICC(2,1)", "95 %", "ICC(3,1)", "ICC(2,k)", "ICC(3,k)"),
        rows,
        f"95 %: percentiles over {RESAMPLES} resamples of the test images. The paper gives a figure on CIFAR; its "
        "numbers are not known to us.",
    )


def _differences(reliability: dict) -> Table:
    rows = []
    for measure, label in MEASURES.items():
        icc, samples = reliability[measure]["icc"], reliability[measure]["samples"]
        low, high = _interval(samples[ACA.name] - samples[RESNET.name])
        difference = icc[ACA.name]["ICC(2,1)"] - icc[RESNET.name]["ICC(2,1)"]
        verdict = "ACA more reliable" if low > 0 else "ResNet more reliable" if high < 0 else "undecided"
        rows.append((label, f"{difference:+.3f}", f"{low:+.3f} to {high:+.3f}", verdict))
    return Table(
        "ICC(2,1) of NODE-ACA minus that of ResNet",
        ("score", "difference", "95 %", ""),
        rows,
        "Undecided: 0 is inside.",
    )


def _draw(settings: Settings, scores: dict, reliability: dict):
    figure = new_figure(11, 4.2)
    agreement, histogram = figure.subplots(1, 2)
    for n, name in enumerate((RESNET.name, ACA.name)):
        for m, measure in enumerate(MEASURES):
            icc = reliability[measure]["icc"][name]["ICC(2,1)"]
            low, high = _interval(reliability[measure]["samples"][name])
            label = name if m == 0 else None
            agreement.bar(m + 0.35 * n, icc, 0.33, color=f"C{n}", label=label)
            agreement.plot([m + 0.35 * n] * 2, [low, high], color="black", marker="_")
        right = scores["correct"][name].sum(1)
        repeats = scores["correct"][name].shape[1]
        counts = np.bincount(right, minlength=repeats + 1)
        histogram.bar(np.arange(repeats + 1) + 0.4 * n - 0.2, counts, 0.4, color=f"C{n}", label=name)
    agreement.set_xticks([0.175, 1.175], MEASURES.values())
    agreement.set(ylabel="ICC(2,1), 95 % interval", title="Agreement of repeated trainings")
    histogram.xaxis.get_major_locator().set_params(integer=True)
    histogram.set(yscale="symlog", xlabel=f"right in so many of {repeats} trainings", ylabel="test images")
    histogram.set_title("How often each test image was classified right")
    for axes in (agreement, histogram):
        axes.grid(alpha=0.3, axis="y")
        axes.legend()
    return save_figure(settings, figure, "retest")
