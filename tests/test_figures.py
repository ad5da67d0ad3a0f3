"""Pictures: what is drawn where, told by pixels and by matplotlib's own objects."""

import io
import statistics
import time

import numpy as np
import pytest
from PIL import Image

from search import figures


def test_a_colour_template_shows_its_red_half_red() -> None:
    """Inputs are channel-first: the first third of a unit's weights is its red channel, row by row."""
    red = np.zeros((3, 4, 4), np.float32)
    red[0, :2] = 1.0  # the upper half is red
    image = figures.weight_tiles(red.reshape(-1, 1), (4, 4, 3))
    upper, lower = image.getpixel((20, 10)), image.getpixel((20, 50))
    assert upper[0] > 200
    assert upper[1] == upper[2] == lower[0] < 128


def test_patterns_show_whatever_their_size() -> None:
    """A unit with tiny weights is drawn exactly like the same unit with large ones."""
    w = np.random.default_rng(0).normal(size=(64, 1)).astype(np.float32)
    pair = np.asarray(figures.weight_tiles(np.hstack([w, 1000 * w]), (8, 8)))
    assert np.abs(pair[2:66, 2:66].astype(int) - pair[2:66, 68:132].astype(int)).max() <= 1


def test_pixel_space_multiplies_by_the_scale() -> None:
    """A network on (x - mean) * scale with weights w is one on x with weights w * scale, and so it is drawn."""
    rng = np.random.default_rng(1)
    w, scale = rng.normal(size=(64, 3)).astype(np.float32), rng.uniform(1, 1.9, 64).astype(np.float32)
    drawn = figures.weight_tiles(w, (8, 8), scale=scale)
    assert drawn.tobytes() == figures.weight_tiles(w * scale[:, None], (8, 8)).tobytes()


@pytest.mark.parametrize("shape", [(8, 8), None])
def test_weights_that_are_not_finite_are_drawn_as_nothing(shape: tuple[int, int] | None) -> None:
    """A network that diverged still gets its picture."""
    w = np.full((64, 5), np.nan, np.float32)
    w[:, 0], w[0, 1] = 1.0, np.inf
    assert figures.weight_tiles(w, shape).width > 100


def test_class_names_stand_below_the_templates() -> None:
    """With names there is ink in the strip below a tile; without names there is no strip."""
    w = np.zeros((64, 2), np.float32)
    plain, named = figures.weight_tiles(w, (8, 8)), figures.weight_tiles(w, (8, 8), classes=["cat", "dog"])
    assert named.height > plain.height
    strip = np.asarray(named)[plain.height - 1 : named.height - 1]
    assert strip[:, : named.width // 2].min() < 128
    assert strip[:, named.width // 2 :].min() < 128


def test_at_most_a_hundred_units_are_drawn() -> None:
    """A wide layer's picture stays as large as that of a hundred units."""
    wide = np.random.default_rng(0).normal(size=(64, 500)).astype(np.float32)
    assert figures.weight_tiles(wide, (8, 8)).size == figures.weight_tiles(wide[:, :100], (8, 8)).size


def test_data_without_a_shape_becomes_a_heat_map() -> None:
    """Positive weights are red, negative ones blue, zero is white."""
    image = figures.weight_tiles(np.array([[1.0, -1.0], [0.0, 0.0]], np.float32), None)
    width, height = image.size
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert image.getpixel((width - 1, 0)) == (0, 0, 255)
    assert image.getpixel((0, height - 1)) == (255, 255, 255)


@pytest.mark.parametrize("c", [2, 10, 100])
def test_a_confusion_matrix_is_dark_where_the_counts_are(c: int) -> None:
    """All on the diagonal: its cells are darker than any other."""
    image = np.asarray(figures.confusion_matrix(50 * np.eye(c, dtype=int))).astype(int)
    cell = 36 if c <= 20 else 720 // c
    left = image.shape[1] - 8 - c * cell
    corner = [image[40 + i * cell + 1, left + j * cell + 1].sum() for i, j in [(0, 0), (c - 1, c - 1), (0, c - 1)]]
    assert corner[0] == corner[1] < corner[2]


def test_long_class_names_stand_upright_above_their_columns() -> None:
    """Every letter of a name is there: the strip above a column holds as much ink as the one beside its row."""
    names = ["automobile", "ship"]
    image = np.asarray(figures.confusion_matrix(np.zeros((2, 2), int), names)).astype(int)
    height, width, _ = image.shape
    beside = (image[height - 80 : height - 44, : width - 80] < 128).sum()
    above = (image[20 : height - 80, width - 80 : width - 44] < 128).sum()
    assert above == beside > 0


def test_thumbnails_are_small_webp() -> None:
    """A large picture shrinks by the smallest whole number that will do, a small one keeps its size."""
    large = figures.thumbnail(Image.new("RGB", (900, 300)), 320)
    with Image.open(io.BytesIO(large)) as image:
        assert image.format == "WEBP"
        assert image.size == (300, 100)
    with Image.open(io.BytesIO(figures.thumbnail(Image.new("RGB", (40, 30))))) as image:
        assert image.size == (40, 30)


def test_the_band_is_one_deviation_over_repeats() -> None:
    """The line is at the mean, the band as wide as the tables say; a run that stopped early counts while it ran."""
    x, table = figures.stack(
        [
            [(0, {"loss/train": 1.0}), (1, {"loss/train": 1.0})],
            [(0, {"loss/train": 3.0})],
        ]
    )
    (axis,) = figures.curves(x, table).axes
    (line,) = axis.lines
    assert list(line.get_ydata()) == [2.0, 1.0]
    band = axis.collections[0].get_paths()[0].vertices
    at_zero = band[band[:, 0] == 0, 1]
    deviation = statistics.stdev([1.0, 3.0])
    assert (at_zero.min(), at_zero.max()) == pytest.approx((2.0 - deviation, 2.0 + deviation))


def test_curves_draw_the_panels_there_is_data_for() -> None:
    """Loss and cost with training and validation, accuracy, eta; values that are not finite leave gaps."""
    values = [1.0, np.nan, np.inf, 0.5]
    keys = ["loss/train", "loss/val", "cost/train", "cost/val", "accuracy/train", "accuracy/val", "eta"]
    figure = figures.curves(range(4), dict.fromkeys(keys, values), title="lambda=0.1")
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "cost", "accuracy", "eta"]
    assert [len(axis.lines) for axis in figure.axes] == [2, 2, 2, 1]
    assert figures.png(figure).startswith(b"\x89PNG")
    assert [a.get_ylabel() for a in figures.curves([0], {"loss/val": [1.0]}).axes] == ["loss"]


def test_a_heat_map_averages_repeats_and_orders_numbers() -> None:
    """Cells hold the mean of what met there, columns and rows ascend, words keep their order."""
    figure = figures.heat_map(
        [0.1, 0.01, 0.1, 0.1], ["b", "a", "b", "a"], [1.0, 2.0, 3.0, np.nan], names=("eta", "init", "accuracy")
    )
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0.01", "0.1"]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["b", "a"]
    assert sorted(t.get_text() for t in axis.texts) == ["2.000", "2.000"]


def test_a_search_path_has_a_colour_and_a_box_for_each_stage() -> None:
    """Points of the two stages differ in colour; both boxes and the star are there, on log axes."""
    figure = figures.search_path(
        [1e-4, 1e-2, 1e-3], [0.1, 0.2, 0.15], ["coarse", "coarse", "fine"], names=("lambda", "eta"),
        log=(True, False), boxes={"coarse": (1e-5, 1e-1, 0, 1), "fine": (1e-4, 1e-2, 0.1, 0.2)}, best=(1e-3, 0.15),
    )  # fmt: skip
    (axis,) = figure.axes
    coarse, fine, star = axis.collections
    assert [len(c.get_offsets()) for c in (coarse, fine, star)] == [2, 1, 1]
    assert tuple(coarse.get_facecolor()[0]) != tuple(fine.get_facecolor()[0])
    assert [(r.get_width(), r.get_height()) for r in axis.patches] == [
        (pytest.approx(1e-1 - 1e-5), 1), (pytest.approx(1e-2 - 1e-4), pytest.approx(0.1))
    ]  # fmt: skip
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "linear")


@pytest.mark.slow
def test_the_pictures_of_a_trial_cost_little() -> None:
    """Three pictures of fifty 32x32x3 units and a confusion matrix, with thumbnails: at most 50 ms CPU when idle."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3072, 50)).astype(np.float32)
    spent = []
    for _ in range(5):
        begun = time.process_time()
        for image in [figures.weight_tiles(w, (32, 32, 3)) for _ in range(3)]:
            figures.png(image), figures.thumbnail(image)
        matrix = figures.confusion_matrix(rng.integers(0, 99, (10, 10)))
        figures.png(matrix), figures.thumbnail(matrix)
        spent.append(time.process_time() - begun)
    assert min(spent) < 0.15  # shared machines are slower; the figure itself belongs to `make bench`


def test_slices_draw_outliers_as_triangles_and_choices_in_order() -> None:
    """A point for each trial by each parameter; the one that lies far below the others marks the axis' lower edge."""
    values = [0.9, 0.91, 0.92, 0.93, 0.05]
    points = {"eta": [0.001, 0.01, 0.1, 1.0, 0.1], "hidden_sizes": ["[50]", "[]", "[50]", "[]", "[50]"]}
    figure = figures.slices(
        points, values, ["coarse"] * 3 + ["fine"] * 2, y_label="accuracy", log={"eta"},
        choices={"hidden_sizes": ("[]", "[50]")},
    )  # fmt: skip
    eta, sizes = figure.axes
    coarse, fine, below = (c.get_offsets() for c in eta.collections)
    assert (len(coarse), fine.tolist(), below.tolist()) == (3, [[1.0, 0.93]], [[0.1, 0.9]])
    assert (eta.get_xscale(), sizes.get_xscale()) == ("log", "linear")
    assert [t.get_text() for t in sizes.get_xticklabels()] == ["[]", "[50]"]
    assert sizes.collections[0].get_offsets()[:, 0].tolist() == [1, 0, 1]


def test_many_parameters_stand_in_rows_and_short_logarithmic_axes_have_readable_ticks() -> None:
    """Nine panels make three rows of three; from 200 to 700 there is a plain number to read, and none overlap."""
    points = {f"p{i}": [200.0, 450.0, 700.0] for i in range(9)}
    figure = figures.slices(points, [0.1, 0.2, 0.3], ["all"] * 3, y_label="accuracy", log=set(points))
    places = [axis.get_position() for axis in figure.axes]
    assert len({round(place.y0, 3) for place in places}) == len({round(place.x0, 3) for place in places}) == 3
    figures.png(figure)
    low, high = figure.axes[0].get_xlim()
    axis = figure.axes[0].xaxis
    shown = {t.get_text() for t in axis.get_ticklabels(which="both") if low <= t.get_position()[0] <= high}
    assert shown - {""} == {"200", "500"}


def test_the_same_figure_has_the_same_svg() -> None:
    """Neither the date nor random ids are in it."""
    first, second = (figures.svg(figures.curves([0, 1], {"loss/val": [2.0, 1.0]})) for _ in range(2))
    assert first == second
    assert first.startswith(b"<?xml")
