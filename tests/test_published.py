"""timm's published results, and effective robustness against them."""

import collections
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, logit

from robustness import published

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import timm_results

CACHED = (published.baseline, published.line, published.resampled_lines)


def test_every_column_of_timms_is_some_protocols_and_every_shift_has_its_line():
    accuracies = set(published.results()[0]) - {"model", "img_size", "crop_pct", "interpolation"}
    assert {*published.COLUMNS.values()} == {name for name in accuracies if "imagenet" in name}
    shifted = {name for name in published.COLUMNS if "clean" not in name} - {"imagenet", "real"}
    assert published.SHIFTS.keys() == shifted
    for name, (clean, *columns) in published.SHIFTS.items():
        assert columns == [published.COLUMNS[clean], published.COLUMNS[name]]


@pytest.fixture(autouse=True)
def forget_made_up_tables():
    yield
    for function in CACHED:
        function.cache_clear()


def test_timms_table_is_whole():
    rows = published.results()
    keys = collections.Counter((row["model"], row["img_size"], row["crop_pct"]) for row in rows)
    assert len(rows) > 1500 and max(keys.values()) == 1
    columns = {column for shift in published.SHIFTS.values() for column in shift[1:]} | {
        "imagenet-real"
    }
    for column in columns:
        values = [float(row[column]) for row in rows if row[column]]
        assert len(values) >= len(rows) - 1 and 0 < min(values) and max(values) < 100
    for _, clean, shifted in published.SHIFTS.values():
        assert all(float(row[shifted]) < float(row[clean]) for row in rows if row[shifted])


def test_the_table_is_gathered_from_timms_files(tmp_path, monkeypatch, capsys):
    """Files in another order, one of them without a model that the others have."""
    evaluations = [
        ("a.in1k", "224", "0.900"),
        ("a.in1k", "288", "1.000"),
        ("b.in21k_ft_in1k", "224", "0.900"),
    ]
    for i, file in enumerate(timm_results.FILES.values()):
        rows = [(*key, f"{10 * i + j}.5", "bicubic", "1.0") for j, key in enumerate(evaluations)]
        rows = rows[:2] if file == "imagenet-a" else rows[::-1]
        lines = [
            ",".join(row)
            for row in [("model", "img_size", "crop_pct", "top1", "interpolation", "top5"), *rows]
        ]
        (tmp_path / f"results-{file}.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(timm_results, "TARGET", tmp_path / "table.csv")
    monkeypatch.setattr("sys.argv", ["timm_results.py", str(tmp_path), "--source", "commit 1234"])
    timm_results.main()
    assert "results-imagenet-a.csv lacks b.in21k_ft_in1k, 224" in capsys.readouterr().out
    monkeypatch.setattr(published, "RESULTS", tmp_path / "table.csv")
    rows = published.results.__wrapped__()
    assert [(row["model"], row["img_size"], row["crop_pct"]) for row in rows] == evaluations
    for i, column in enumerate(timm_results.FILES):
        lacking = column == "imagenet-a"
        assert [row[column] for row in rows] == [f"{10 * i + j}.5" for j in (0, 1)] + [
            "" if lacking else f"{10 * i + 2}.5"
        ]
    assert "commit 1234" in (tmp_path / "table.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    "model, alone",
    [
        ("resnet50.a1_in1k", True), ("beitv2_base_patch16_224.in1k_ft_in1k", False),
        ("resnetv2_50x1_bit.goog_distilled_in1k", False), ("edgenext_base.usi_in1k", False),
        ("xcit_nano_12_p8_224.fb_dist_in1k", True), ("repvit_m1.dist_in1k", True),
        ("tf_efficientnet_b5.in1k", True),
        ("vit_small_patch32_224.augreg_in21k_ft_in1k", False),
        ("convnext_base.in12k_ft_in1k", False), ("convnext_base.in22k_ft_in1k", False),
        ("vit_base_patch16_clip_224.laion2b_ft_in1k", False),
        ("vit_base_patch16_clip_224.openai_ft_in1k", False),
        ("resnext50_32x4d.fb_ssl_yfcc100m_ft_in1k", False),
        ("resnext50_32x4d.fb_swsl_ig1b_ft_in1k", False), ("tf_efficientnet_b0.ns_jft_in1k", False),
        ("regnety_320.swag_ft_in1k", False), ("regnety_320.seer_ft_in1k", False),
        ("vit_so400m_x.webli_ft_in1k", False), ("eva02_large_patch14_448.mim_m38m_ft_in1k", False),
        ("hgnetv2_b0.ssld_stage2_ft_in1k", False),
        ("resnet50", False), ("vit_base_patch16_224.augreg_in21k", False),
    ],
)  # fmt: skip
def test_what_a_model_was_trained_on_goes_by_its_name(model, alone):
    assert published.imagenet_alone(model) == alone


def made_up(monkeypatch, clean, shifted, others=()):
    """A table in which models of ImageNet-1k alone have these accuracies on ImageNet and V2."""
    names = [f"net{i}.a_in1k" for i in range(len(clean))]
    rows = [
        {"model": name, "imagenet": str(100 * x), "imagenetv2-matched-frequency": str(100 * y)}
        for name, x, y in zip(names, clean, shifted)
    ]
    monkeypatch.setattr(published, "results", lambda: [*rows, *others])
    for function in CACHED:
        function.cache_clear()


def answers(share, images):
    return np.arange(images) < round(share * images)


@pytest.mark.parametrize("above", [0.0, 0.05, -0.05])
def test_points_above_a_line_that_timms_models_lie_on(monkeypatch, above):
    clean = np.linspace(0.4, 0.9, 30)
    others = [
        {"model": "big.in21k_ft_in1k", "imagenet": "80", "imagenetv2-matched-frequency": "79"}
    ]
    made_up(monkeypatch, clean, expit(1.2 * logit(clean) - 0.7), others)
    assert published.line("v2") == pytest.approx((1.2, -0.7))
    on_it = expit(1.2 * logit(0.75) - 0.7)
    found = published.effective_robustness(
        answers(0.75, 50_000), answers(on_it + above, 10_000), "v2"
    )
    assert found["above"] == pytest.approx(above, abs=1e-4) and found["expected"] == pytest.approx(
        on_it
    )
    assert (found["clean"], found["extrapolated"]) == (0.75, False)
    assert [found["usual_low"], found["usual_high"]] == pytest.approx([0, 0], abs=1e-9)
    assert found["unusual"] == (above != 0)
    # Without an uncertain line, the errors of two proportions remain, one of them carried
    # through the line.
    slope = 1.2 * on_it * (1 - on_it) / (0.75 * 0.25)
    shifted = on_it + above
    error = math.sqrt(shifted * (1 - shifted) / 10_000 + slope**2 * 0.75 * 0.25 / 50_000)
    assert (found["high"] - found["low"]) / (2 * 1.96) == pytest.approx(error, rel=0.05)
    assert (found["high"] + found["low"]) / 2 == pytest.approx(above, abs=0.1 * error)


def test_the_interval_holds_the_lines_own_uncertainty(monkeypatch):
    """With very many images, it is that of a regression's line at this accuracy."""
    rng = np.random.default_rng(0)
    x = rng.normal(1, 0.5, 400)
    noise = rng.normal(0, 0.3, 400)
    made_up(monkeypatch, expit(x), expit(x - 0.5 + noise))
    at = logit(0.9)
    found = published.effective_robustness(answers(0.9, 10**7), answers(0.5, 10**7), "v2")
    error = 0.3 * math.sqrt(1 / 400 + (at - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
    error *= found["expected"] * (1 - found["expected"])
    assert (found["high"] - found["low"]) / (2 * 1.96) == pytest.approx(error, rel=0.12)


@pytest.mark.parametrize("protocol", published.SHIFTS)
def test_what_is_usual_holds_95_percent_of_timms_models_at_every_accuracy(protocol):
    models = published.baseline(protocol)
    models = models[np.argsort(models[:, 0])]
    above = models[:, 1] - published.expected(models[:, 0], *published.line(protocol))
    ranges = np.array([published.usual(clean, protocol) for clean in models[:, 0]])
    within = (ranges[:, 0] <= above) & (above <= ranges[:, 1])
    for fifth in np.array_split(within, 5):
        assert 0.9 < fifth.mean() < 0.99


def test_what_is_usual_is_that_of_models_of_nearly_the_same_accuracy(monkeypatch):
    monkeypatch.setattr(published, "NEIGHBOURS", 41)
    clean = np.linspace(0.3, 0.85, 400)
    far = np.where(clean > 0.6, 0.1, 0.01)  # they scatter ten times as much above 0.6
    made_up(monkeypatch, clean, clean + far * np.resize([-1, 1], 400))
    monkeypatch.setattr(published, "line", lambda _: (1.0, 0.0))
    for at, scatter in ((0.45, 0.01), (0.75, 0.1)):
        assert published.usual(at, "v2") == pytest.approx((-scatter, scatter))
    found = published.effective_robustness(answers(0.45, 10**6), answers(0.5, 10**6), "v2")
    assert found["unusual"] and found["low"] > found["usual_high"]
    found = published.effective_robustness(answers(0.75, 10**6), answers(0.8, 10**6), "v2")
    assert not found["unusual"] and found["low"] > 0


def test_a_model_counts_once_and_what_timm_lacks_not_at_all(monkeypatch):
    rows = [
        {"model": "a.in1k", "imagenet": "70", "imagenetv2-matched-frequency": "60"},
        {"model": "a.in1k", "imagenet": "72", "imagenetv2-matched-frequency": "61"},
        {"model": "b.in1k", "imagenet": "80", "imagenetv2-matched-frequency": ""},
        {"model": "c.in1k", "imagenet": "50", "imagenetv2-matched-frequency": "40"},
    ]
    made_up(monkeypatch, [], [], rows)
    assert sorted(published.baseline("v2").tolist()) == [[0.5, 0.4], [0.72, 0.61]]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95, 1.0])
def test_an_accuracy_beyond_timms_is_said_to_be(monkeypatch, share):
    clean = np.linspace(0.4, 0.9, 30)
    made_up(monkeypatch, clean, clean)
    found = published.effective_robustness(answers(share, 1000), answers(share, 1000), "v2")
    assert found["extrapolated"] and found["above"] == pytest.approx(0, abs=1e-9)
    assert math.isfinite(found["low"]) and math.isfinite(found["high"])
