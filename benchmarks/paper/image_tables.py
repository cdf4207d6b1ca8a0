"""Tables that compare the trained nets of ``image``: ratios, tests of paired differences, agreement of trainings."""

from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np

from benchmarks.paper.common import Settings, Table
from benchmarks.paper.image_models import ACA, ADJOINT, ADJOINT_LOOSE, BATCH_NORM, GROUP_NORM, NAIVE, RESNET, Model
from benchmarks.paper.image_training import final_error
from benchmarks.paper.images import Images
from benchmarks.paper.reliability import icc_samples, interval, intraclass_correlations, resampled_means, sign_flip_p

Results = dict[Model, dict[int, dict[str, Any]]]  # results of ``trained`` by model and seed
MEASURES = {"correct": "right or wrong", "probability": "probability of the true class"}
SIGNIFICANT = 0.05


def pairs_of(results: Results, *others: Model) -> Iterator[tuple[Model, Model]]:
    """ACA with each of ``others`` of the same normalization, if both have results of the same seed."""
    for family in (BATCH_NORM, GROUP_NORM):
        aca = family[BATCH_NORM.index(ACA)]
        for other in others:
            other = family[BATCH_NORM.index(other)]
            if aca in results and other in results and paired(results, aca, other):
                yield aca, other


def paired(results: Results, a: Model, b: Model) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Results of the two models for the seeds that both have."""
    return [(results[a][seed], results[b][seed]) for seed in results[a] if seed in results[b]]


def target(settings: Settings, results: Results) -> Table:
    clock, clock_name = ("cpu_seconds", "CPU seconds") if settings.device.type == "cpu" else ("seconds", "seconds")
    rows = []
    for aca, other in pairs_of(results, ADJOINT, NAIVE, ADJOINT_LOOSE):
        pairs = paired(results, aca, other)
        error, error_other = (median(final_error(pair[i]) for pair in pairs) for i in (0, 1))
        times, times_other = (median(pair[i]["curve"][-1][clock] for pair in pairs) for i in (0, 1))
        evaluations, evaluations_other = (
            median(pair[i]["curve"][-1]["forward"] + pair[i]["curve"][-1]["backward"] for pair in pairs) for i in (0, 1)
        )
        in_twice_the_time = median(_error_after(them, clock, 2 * us["curve"][-1][clock]) for us, them in pairs)
        error_ratio, time_ratio = _ratio(error, error_other), _ratio(times, times_other)
        rows.append(
            (
                other.name,
                len(pairs),
                f"{error_ratio:.2f} ({_reached(error_ratio)})",
                f"{time_ratio:.2f} ({_reached(time_ratio)})",
                f"{evaluations / evaluations_other:.2f}",
                f"{in_twice_the_time:.2f} ({_reached(_ratio(error, in_twice_the_time))})",
            )
        )
    return Table(
        "ACA over the others: at most half the error in at most half the time?",
        ("against", "seeds", "error ratio", "time ratio", "f evaluations ratio", "its error % in twice ACA's time"),
        rows,
        f"Ratios of medians after equally many epochs; yes: at most 0.5. Time: {clock_name}. Last column: the other's "
        "error after\nthe last epoch that ended by then; yes: ACA's is at most half of it.",
    )


def _error_after(run: dict[str, Any], clock: str, seconds: float) -> float:
    """Test error of the last epoch that ended within ``seconds``; 100 if none did."""
    return next((point["error"] for point in reversed(run["curve"]) if point[clock] <= seconds), 100.0)


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("inf") if a else 1.0


def _reached(ratio: float) -> str:
    return "yes" if ratio <= 0.5 else "no"


def differences(results: Results) -> Table:
    """Tests of the errors of ACA against the others, over the seeds and over the test images."""
    rows = []
    for aca, other in pairs_of(results, RESNET, ADJOINT, NAIVE, ADJOINT_LOOSE):
        pairs = paired(results, aca, other)
        of_seeds = np.array([final_error(us) - final_error(them) for us, them in pairs])
        right = [np.mean([pair[i]["correct"].numpy() for pair in pairs], 0) for i in (0, 1)]
        of_images = 100 * (right[1] - right[0])
        low, high = interval(resampled_means(of_images))
        p_seeds, p_images = sign_flip_p(of_seeds), sign_flip_p(of_images)
        differs = max(p_seeds, p_images) < SIGNIFICANT
        verdict = "differs" if differs else "no difference shown"
        numbers = (f"{of_seeds.mean():+.2f}", f"{low:+.2f} to {high:+.2f}", f"{p_seeds:.3f}", f"{p_images:.3f}")
        rows.append((f"{aca.name} - {other.name}", len(pairs), *numbers, verdict))
    return Table(
        "differences of the test error in percentage points, paired by seed",
        ("", "seeds", "mean", "95 % (images)", "p (seeds)", "p (images)", "verdict"),
        rows,
        f"p: two-sided sign-flip permutation tests of the mean, over seeds (other trainings; n seeds allow none below "
        f"2/2ⁿ) and over images\n(other images, the same nets). Differs: both below {SIGNIFICANT:g}. 95 %: resampled "
        "images. Not corrected for the number of rows.",
    )


def agreement(images: Images, results: Results, seed: int) -> Table:
    """Test-retest reliability, NODE-ACA against ResNet, with the seeds as judges of the test images."""
    rows = []
    for measure, label in MEASURES.items():
        for aca, resnet in pairs_of(results, RESNET):
            pairs = paired(results, aca, resnet)
            if len(pairs) < 2:
                continue
            scores = {
                model.name: np.stack([pair[i][measure].numpy() for pair in pairs], 1)
                for i, model in enumerate((aca, resnet))
            }
            samples = icc_samples(scores, seed)
            low, high = interval(samples[aca.name] - samples[resnet.name])
            verdict = "ACA more reliable" if low > 0 else "ResNet more reliable" if high < 0 else "undecided"
            cells = []
            for name, x in scores.items():
                bounds = interval(samples[name])
                cells.append(f"{intraclass_correlations(x)['ICC(2,1)']:.3f} ({bounds[0]:.3f} to {bounds[1]:.3f})")
            rows.append((label, aca.norm, len(pairs), *cells, f"{low:+.3f} to {high:+.3f}", verdict))
    return Table(
        f"{images.name}: agreement ICC(2,1) of trainings with other seeds on {len(images.test[1])} test images",
        ("score", "norm", "seeds", "NODE aca", "ResNet", "difference", "verdict"),
        rows,
        "Intraclass correlation of Shrout & Fleiss (Psychol. Bull. 86, 1979). In brackets, and for the difference: "
        "95 %, over\nresampled images. Undecided: 0 is inside. The paper gives a figure on CIFAR; its numbers "
        "are not known to us.",
    )
