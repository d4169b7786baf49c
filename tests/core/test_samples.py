import builtins
import json
import sys

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.errors import UserError
from qgraph.feeds import InputSpec
from qgraph.samples import open_samples, signature, split

IMAGE = InputSpec("images", "float32", (1, 3, 4, 6))
VECTOR = InputSpec("x", "float32", (None, 3))


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def numbered(count, shape, dtype=np.float32):
    """Return an array whose samples can be told apart: sample i is full of i."""
    return np.broadcast_to(np.arange(count).reshape(-1, *[1] * len(shape)), (count, *shape)).astype(dtype)


def firsts(samples, name="x"):
    return [int(feed[name].reshape(-1)[0]) for feed in samples]


def test_signature_leaves_out_what_a_caller_may_override():
    model = ir.from_onnx_text(
        """
        <ir_version: 3, opset_import: ["" : 9]>
        g (float[n, 3] x, int64[2] k, float[3] w = {1, 2, 3}, bool flag, string[] names) => (float[n, 3] y)
        { y = Mul (x, w) }
        """
    )
    assert signature(model) == (
        InputSpec("x", "float32", (None, 3)),
        InputSpec("k", "int64", (2,)),
        InputSpec("flag", "bool", ()),
        InputSpec("names", "string", None),
    )


# --- arrays


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 3, 4, 6)])
def test_the_first_axis_counts_samples_batched_or_not(tmp_path, writer, shape):
    writer(tmp_path / "a.npz", images=numbered(5, shape))
    samples = open_samples(tmp_path / "a.npz", [IMAGE])
    assert len(samples) == 5
    for _ in range(2):
        assert firsts(samples, "images") == [0, 1, 2, 3, 4]
    assert all(feed["images"].shape == (1, 3, 4, 6) for feed in samples)


def test_a_fixed_batch_groups_samples_and_drops_the_rest(tmp_path):
    path = save(tmp_path / "a.npz", images=numbered(7, (3, 4, 6)), labels=np.arange(7) * 10)
    samples = open_samples(path, [InputSpec("images", "float32", (2, 3, 4, 6))])
    assert [feed["images"][:, 0, 0, 0].tolist() for feed in samples] == [[0, 1], [2, 3], [4, 5]]
    assert samples.labels().tolist() == [0, 10, 20, 30, 40, 50]
    with pytest.raises(UserError, match="holds 7 samples, but input 'images' takes 8 at once"):
        open_samples(path, [InputSpec("images", "float32", (8, 3, 4, 6))])


def test_a_dynamic_batch_is_as_asked_for(tmp_path):
    path = save(tmp_path / "a.npz", x=numbered(6, (3,)))
    assert firsts(open_samples(path, [VECTOR])) == [0, 1, 2, 3, 4, 5]
    assert [feed["x"].shape for feed in open_samples(path, [VECTOR], batch=3)] == [(3, 3)] * 2
    with pytest.raises(UserError, match="batch must be positive"):
        open_samples(path, [VECTOR], batch=0)


def test_several_inputs_states_and_shared_scalars(tmp_path):
    inputs = [VECTOR, InputSpec("state", "float32", (2, None, 4)), InputSpec("rate", "int64", ())]
    path = save(tmp_path / "a.npz", x=numbered(3, (3,)), state=numbered(3, (2, 1, 4)), rate=np.array(16000))
    samples = open_samples(path, inputs)
    assert firsts(samples) == firsts(samples, "state") == [0, 1, 2]
    assert [(feed["state"].shape, feed["rate"].shape, int(feed["rate"])) for feed in samples] == [
        ((2, 1, 4), (), 16000)
    ] * 3
    save(path, x=numbered(3, (3,)), state=numbered(2, (2, 1, 4)), rate=np.arange(3))
    with pytest.raises(UserError, match="different numbers of samples: 'x' 3, 'state' 2, 'rate' 3"):
        open_samples(path, inputs)


def test_only_the_rows_of_a_feed_are_read(tmp_path, monkeypatch):
    path = save(tmp_path / "a.npz", x=numbered(100, (3,)))
    samples = open_samples(path, [VECTOR])
    counts = []
    original = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *a, **k: counts.append(a[2]) or original(*a, **k))
    assert firsts(samples) == list(range(100))
    assert counts == [3] * 100


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.asfortranarray(numbered(4, (3,))), "float32"),
        (numbered(4, (3,)).astype(">f4"), "float32"),
        (numbered(4, (3,), np.float64), "float32"),
        (numbered(4, (3,), np.float64), "float16"),
        (numbered(4, (3,), np.int32), "int64"),
        (numbered(4, (3,), np.uint8), "int64"),
        (numbered(4, (3,), np.int64), "int32"),
        (numbered(4, (3,), np.int64), "uint8"),
    ],
)
def test_types_that_go_together_are_converted(tmp_path, array, dtype):
    samples = open_samples(save(tmp_path / "a.npz", x=array), [InputSpec("x", dtype, (None, 3))])
    assert firsts(samples) == [0, 1, 2, 3]
    assert all(feed["x"].dtype == np.dtype(dtype) for feed in samples)


@pytest.mark.parametrize(
    ("array", "dtype", "message"),
    [
        (numbered(4, (3,), np.uint8), "float32", r"is uint8, but input 'x' is float32\. .* --preprocess PRESET"),
        (numbered(4, (3,), np.int64), "float32", r"is int64, but input 'x' is float32\. .*astype\('float32'\)"),
        (numbered(4, (3,)), "int64", r"is float32, but input 'x' is int64"),
        (numbered(4, (3,), np.int64) + 300, "uint8", "holds numbers that uint8 cannot"),
        (numbered(4, (3,)), "string", "takes text"),
    ],
)
def test_types_that_do_not_are_refused(tmp_path, array, dtype, message):
    samples = open_samples(save(tmp_path / "a.npz", x=array), [InputSpec("x", dtype, (None, 3))])
    with pytest.raises(UserError, match=message):
        list(samples)


def test_a_wrong_name_is_answered_with_the_names_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("boxes.npz", image=numbered(2, (3, 4, 6)), labels=np.arange(2))
    with pytest.raises(UserError) as caught:
        open_samples("boxes.npz", [IMAGE])
    assert str(caught.value) == (
        "boxes.npz has no array for input 'images' (it has: 'image', 'labels'). Rename it, or pass --map image=images."
    )
    assert len(open_samples("boxes.npz", [IMAGE], rename={"image": "images"})) == 2
    with pytest.raises(UserError, match="has no array 'picture' "):
        open_samples("boxes.npz", [IMAGE], rename={"picture": "images"})
    with pytest.raises(UserError, match=r"no input 'imagse'\. Did you mean 'images'\?"):
        open_samples("boxes.npz", [IMAGE], rename={"image": "imagse"})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 4, 6, 3), r"\[5, 4, 6, 3\], but input 'images' takes \[1, 3, 4, 6\]\. Move .* is \[5, 3, 4, 6\]"),
        ((5, 3, 4, 7), r"\[5, 3, 4, 7\], but input 'images' takes \[1, 3, 4, 6\]"),
        ((72,), r"\[72\], but input 'images' takes \[1, 3, 4, 6\]\. Its first axis counts the samples"),
        ((), r"\[\], but input"),
    ],
)
def test_a_wrong_shape_is_told_with_the_right_one(tmp_path, shape, message):
    with pytest.raises(UserError, match=message):
        open_samples(save(tmp_path / "a.npz", images=np.zeros(shape, np.float32)), [IMAGE])


def test_labels_are_kept_beside_the_inputs(tmp_path):
    path = save(tmp_path / "a.npz", x=numbered(4, (3,)), labels=np.arange(4) * 2, digits=np.arange(4) + 7)
    samples = open_samples(path, [VECTOR])
    assert samples.labels().tolist() == [0, 2, 4, 6]
    assert samples.labels("digits").tolist() == [7, 8, 9, 10]
    with pytest.raises(UserError, match=r"no array 'names' for labels \(it has: 'x', 'labels', 'digits'\)"):
        samples.labels("names")
    assert open_samples(save(path, x=numbered(4, (3,))), [VECTOR]).labels() is None
    with pytest.raises(UserError, match=r"'labels' has shape \[3\], but there are 4 samples"):
        open_samples(save(path, x=numbered(4, (3,)), labels=np.arange(3)), [VECTOR]).labels()


def test_files_that_cannot_be_read_are_told(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match=r"text\.npz cannot be read"):
        open_samples(tmp_path / "text.npz", [VECTOR])
    whole = save(tmp_path / "whole.npz", x=numbered(400, (3,))).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.npz cannot be read"):
        open_samples(tmp_path / "cut.npz", [VECTOR])
    objects = np.array([{"a": 1}, None, 3], dtype=object)
    with pytest.raises(UserError, match=r"objects.npz cannot be read: Object arrays"):
        open_samples(save(tmp_path / "objects.npz", x=objects), [VECTOR])
    with pytest.raises(UserError, match="holds 0 samples"):
        open_samples(save(tmp_path / "none.npz", x=numbered(0, (3,))), [VECTOR])
    with pytest.raises(UserError, match=r"nowhere\.npz does not exist"):
        open_samples(tmp_path / "nowhere.npz", [VECTOR])
    (tmp_path / "a.pdf").write_text("")
    with pytest.raises(UserError, match="no data that can be read"):
        open_samples(tmp_path / "a.pdf", [VECTOR])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither \.npz files nor images"):
        open_samples(tmp_path / "empty", [VECTOR])


def test_a_folder_of_npz_files_is_one_feed_each_sorted_by_name(tmp_path):
    for number in (2, 0, 10, 1):
        save(tmp_path / f"{number:02}.npz", image=np.full((1, 3), number, np.float32), labels=np.array([number * 5]))
    samples = open_samples(tmp_path, [VECTOR], rename={"image": "x"})
    assert firsts(samples) == [0, 1, 2, 10]
    assert samples.labels().tolist() == [0, 5, 10, 50]
    save(tmp_path / "01.npz", image=np.zeros((1, 4), np.float32))
    with pytest.raises(UserError, match=r"01.npz: 'x' has shape \[1, 4\], but the input takes \[\?, 3\]"):
        list(samples)


# --- images


def write_images(folder, count=3, size=(40, 30)):
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return sorted(folder.glob("*.png"))


def resized(path, box, size):
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB").crop(box).resize(size, Image.Resampling.BILINEAR), np.float64)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("imagenet", lambda rgb: (rgb / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]),
        ("mobilenet", lambda rgb: rgb / 127.5 - 1),
        ("caffe", lambda rgb: rgb[..., ::-1] - [104, 117, 123]),
    ],
)
def test_presets_that_crop_the_centre(tmp_path, preset, expected):
    # 40 x 32 pixels: the crop keeps 87.5 % of the shorter side, 28 x 28, and is resized to 14 x 14.
    files = write_images(tmp_path, size=(40, 32))
    feeds = list(open_samples(tmp_path, [InputSpec("x", "float32", (None, 3, 14, 14))], preprocess=preset))
    assert len(feeds) == 3
    for feed, path in zip(feeds, files, strict=True):
        reference = expected(resized(path, (6, 2, 34, 30), (14, 14)))
        assert feed["x"].shape == (1, 3, 14, 14)
        assert feed["x"].dtype == np.float32
        tolerance = np.abs(expected(np.ones((1, 1, 3))) - expected(np.zeros((1, 1, 3)))).max() * 4
        assert np.abs(feed["x"][0].transpose(1, 2, 0) - reference).mean() < tolerance


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("unit", lambda rgb: rgb / 255),
        ("unit-bgr", lambda rgb: rgb[..., ::-1] / 255),
        ("centred", lambda rgb: (rgb - 127) / 128),
        ("pixels", lambda rgb: rgb),
        ("cifar10", lambda rgb: (rgb / 255 - [0.4914, 0.4822, 0.4465]) / [0.2470, 0.2435, 0.2616]),
    ],
)
@pytest.mark.parametrize("channels_first", [True, False])
def test_presets_of_the_whole_picture(tmp_path, preset, expected, channels_first):
    files = write_images(tmp_path, size=(12, 8))
    shape = (1, 3, 8, 12) if channels_first else (1, 8, 12, 3)
    feeds = list(open_samples(tmp_path, [InputSpec("x", "float32", shape)], preprocess=preset))
    for feed, path in zip(feeds, files, strict=True):
        pixels = feed["x"][0].transpose(1, 2, 0) if channels_first else feed["x"][0]
        np.testing.assert_allclose(pixels, expected(resized(path, (0, 0, 12, 8), (12, 8))), rtol=1e-5, atol=1e-5)


def test_arrays_of_images_are_scaled_as_files_are(tmp_path):
    files = write_images(tmp_path, count=4, size=(12, 8))
    pixels = np.stack([resized(path, (0, 0, 12, 8), (12, 8)) for path in files]).astype(np.uint8)
    spec = InputSpec("x", "float32", (None, 3, 8, 12))
    reference = list(open_samples(tmp_path, [spec], preprocess="unit-bgr"))
    for array in (pixels, pixels.transpose(0, 3, 1, 2)):
        path = save(tmp_path / "a.npz", x=array, labels=np.arange(4))
        samples = open_samples(path, [spec], preprocess="unit-bgr", batch=2)
        np.testing.assert_array_equal(
            np.concatenate([feed["x"] for feed in samples]), np.concatenate([feed["x"] for feed in reference])
        )
        assert samples.labels().tolist() == [0, 1, 2, 3]
    grey = InputSpec("x", "float32", (1, 1, 8, 12))
    plain = open_samples(save(path, x=pixels[..., 0]), [grey], preprocess="pixels")
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in plain])[:, 0], pixels[..., 0])
    smaller = open_samples(save(path, x=pixels), [InputSpec("x", "float32", (1, 3, 4, 6))], preprocess="unit")
    assert next(iter(smaller))["x"].shape == (1, 3, 4, 6)
    with pytest.raises(UserError, match=r"\[1, 8\], which is none of images"):
        list(open_samples(save(path, x=pixels[:, :, 0, 0]), [grey], preprocess="unit"))


def test_what_images_need(tmp_path, monkeypatch):
    write_images(tmp_path)
    with pytest.raises(UserError, match="images need --preprocess PRESET: imagenet, mobilenet"):
        open_samples(tmp_path, [IMAGE])
    with pytest.raises(UserError, match=r"no preset 'imagnet'\. Did you mean 'imagenet'\?"):
        open_samples(tmp_path, [IMAGE], preprocess="imagnet")
    with pytest.raises(UserError, match="can feed one input, but the model has 2: 'images', 'x'"):
        open_samples(tmp_path, [IMAGE, VECTOR], preprocess="unit")
    with pytest.raises(UserError, match=r"\[\?, 3\], which is none of images"):
        open_samples(tmp_path, [VECTOR], preprocess="unit")
    with pytest.raises(UserError, match="fix it with --shape x=1,3,224,224"):
        open_samples(tmp_path, [InputSpec("x", "float32", (None, 3, None, None))], preprocess="unit")
    with pytest.raises(UserError, match="no array 'y' for labels"):
        open_samples(tmp_path, [IMAGE], preprocess="unit").labels("y")
    (tmp_path / "9.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"9\.jpg cannot be read as an image"):
        list(open_samples(tmp_path, [IMAGE], preprocess="unit"))
    without(monkeypatch, "PIL")
    with pytest.raises(UserError, match=r"pip install 'qgraph-compiler\[images\]'"):
        open_samples(tmp_path, [IMAGE], preprocess="unit")


def without(monkeypatch, package):
    original = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)


# --- text


@pytest.fixture
def tokenizer(tmp_path):
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    words = {word: number for number, word in enumerate(["[UNK]", "[PAD]", "[CLS]", "a", "b", "c"])}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    made.enable_padding(length=50)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def text_inputs(*names, shape=(None, None), dtype="int64"):
    return [InputSpec(name, dtype, shape) for name in names]


def test_lines_become_padded_batches(tmp_path, tokenizer):
    path = tmp_path / "lines.txt"
    path.write_text("a b\n\nc\nb z\na a a\n")
    inputs = text_inputs("input_ids", "attention_mask", "token_type_ids", "position_ids", dtype="int32")
    samples = open_samples(path, inputs, tokenizer=tokenizer, batch=2)
    first, second = list(samples)
    assert first["input_ids"].tolist() == [[2, 3, 4], [2, 5, 1]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert first["token_type_ids"].tolist() == [[0, 0, 0]] * 2
    assert first["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert second["input_ids"].tolist() == [[2, 4, 0, 1], [2, 3, 3, 3]]
    assert {array.dtype for array in first.values()} == {np.dtype(np.int32)}
    assert len(open_samples(path, inputs, tokenizer=tokenizer)) == 1
    assert len(open_samples(path, inputs, tokenizer=tokenizer, batch=3)) == 2


def test_fixed_shapes_and_models_without_a_mask(tmp_path, tokenizer):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, ["a b c a b c", {"text": "b"}, "c"])))
    (fixed,) = open_samples(path, text_inputs("input_ids", "attention_mask", shape=(2, 5)), tokenizer=tokenizer)
    assert fixed["input_ids"].tolist() == [[2, 3, 4, 5, 3], [2, 4, 1, 1, 1]]
    bare = open_samples(path, text_inputs("input_ids"), tokenizer=tokenizer)
    assert [feed["input_ids"].shape for feed in bare] == [(1, 7), (1, 2), (1, 2)]


def test_what_text_needs(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "lines.txt"
    path.write_text("a\n")
    inputs = text_inputs("input_ids", "attention_mask")
    with pytest.raises(UserError, match=r"is text: pass --tokenizer tokenizer.json"):
        open_samples(path, inputs)
    with pytest.raises(UserError, match=r"text cannot fill input 'images' \[1, 3, 4, 6\]"):
        open_samples(path, [IMAGE], tokenizer=tokenizer)
    with pytest.raises(UserError, match="no input 'input_ids'"):
        open_samples(path, text_inputs("attention_mask"), tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"lines.txt is no tokenizer.json"):
        open_samples(path, inputs, tokenizer=path)
    (tmp_path / "bad.jsonl").write_text('"a"\n{"words": "b"}')
    with pytest.raises(UserError, match=r'bad.jsonl, line 2: must be a string, or an object with "text"'):
        open_samples(tmp_path / "bad.jsonl", inputs, tokenizer=tokenizer)
    (tmp_path / "bad.jsonl").write_text('"a')
    with pytest.raises(UserError, match="line 1: no valid JSON"):
        open_samples(tmp_path / "bad.jsonl", inputs, tokenizer=tokenizer)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        open_samples(path, inputs, tokenizer=tokenizer)
    path.write_text("\n  \n")
    with pytest.raises(UserError, match=r"lines\.txt holds no samples"):
        open_samples(path, inputs, tokenizer=tokenizer)
    without(monkeypatch, "tokenizers")
    with pytest.raises(UserError, match=r"pip install 'qgraph-compiler\[text\]'"):
        open_samples(path, inputs, tokenizer=tokenizer)


# --- Python


@pytest.mark.parametrize("wrap", [list, tuple, iter, lambda feeds: (feed for feed in feeds)])
def test_any_iterable_of_feeds_can_be_gone_through_again(wrap):
    feeds = [{"x": np.full((1, 3), n, np.float64), "labels": n, "extra": "?"} for n in range(4)]
    samples = open_samples(wrap(feeds), [VECTOR])
    for _ in range(2):
        assert firsts(samples) == [0, 1, 2, 3]
    assert {feed["x"].dtype for feed in samples} == {np.dtype(np.float32)}
    assert [list(feed) for feed in samples] == [["x"]] * 4
    assert samples.labels().tolist() == [0, 1, 2, 3]
    assert firsts(open_samples([{"y": feed["x"]} for feed in feeds], [VECTOR], rename={"y": "x"})) == [0, 1, 2, 3]


def test_a_function_is_called_anew_for_every_round(tmp_path, monkeypatch):
    (tmp_path / "feeds_of_mine.py").write_text(
        "import numpy as np\ncalls = []\n"
        "def many():\n    calls.append(1)\n    yield from ({'x': np.full((1, 3), n)} for n in (0.0, 1.0))\n"
        "def wrong(): return [3]\ndef nothing(): return None\nthing = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    samples = open_samples("feeds_of_mine:many", [VECTOR])
    assert sys.path == before
    calls = len(sys.modules["feeds_of_mine"].calls)
    assert firsts(samples) == firsts(samples) == [0, 1]
    assert len(sys.modules["feeds_of_mine"].calls) == calls + 2
    for name, message in (
        ("wrong", "feed 0 is int, not a dictionary"),
        ("nothing", "must give feeds, not NoneType"),
        ("thing", "is not callable"),
        ("absent", "cannot be loaded"),
    ):
        with pytest.raises(UserError, match=message):
            open_samples(f"feeds_of_mine:{name}", [VECTOR])
    with pytest.raises(UserError, match="no_such_module:f cannot be loaded"):
        open_samples("no_such_module:f", [VECTOR])
    monkeypatch.delitem(sys.modules, "feeds_of_mine")


def test_faults_of_feeds_are_told_with_their_number():
    good = {"x": np.zeros((1, 3), np.float32)}
    with pytest.raises(UserError, match=r"feed 0 has no array for input 'x' \(it has: 'y'\)"):
        open_samples([{"y": 1}], [VECTOR])
    samples = open_samples([good, {"x": np.zeros((1, 4))}], [VECTOR])
    with pytest.raises(UserError, match=r"feed 1: 'x' has shape \[1, 4\], but the input takes \[\?, 3\]"):
        list(samples)
    with pytest.raises(UserError, match="feed 1 has no 'labels'"):
        open_samples([{**good, "labels": 1}, good], [VECTOR]).labels("labels")
    with pytest.raises(UserError, match="the calibration data holds no samples"):
        open_samples([], [VECTOR])


# --- parts


def test_a_limit_spreads_over_all(tmp_path):
    path = save(tmp_path / "a.npz", x=numbered(100, (3,)))
    assert firsts(open_samples(path, [VECTOR], limit=4)) == [12, 37, 62, 87]
    assert len(open_samples(path, [VECTOR], limit=1000)) == 100
    with pytest.raises(UserError, match="must be positive, not 0"):
        open_samples(path, [VECTOR], limit=0)


@pytest.mark.parametrize("count", [2, 3, 5, 10, 100, 101])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_held_back_samples_are_spread_evenly_and_the_parts_make_the_whole(tmp_path, count, share):
    samples = open_samples(save(tmp_path / "a.npz", x=numbered(count, (3,)), labels=np.arange(count)), [VECTOR])
    kept, held = split(samples, share, seed=3)
    assert sorted(firsts(kept) + firsts(held)) == list(range(count))
    assert firsts(kept) == sorted(firsts(kept))
    assert held.labels().tolist() == firsts(held)
    assert len(held) == min(max(1, round(count * share)), count - 1)
    stretches = [one * len(held) // count for one in firsts(held)]
    assert max(np.bincount(stretches)) <= 2
    again = split(samples, share, seed=3)
    assert [part.indices for part in again] == [kept.indices, held.indices]
    assert count < 10 or share != 0.2 or split(samples, share, seed=4)[1].indices != held.indices


def test_a_single_sample_serves_as_both_parts():
    samples = open_samples([{"x": np.zeros((1, 3))}], [VECTOR])
    assert [len(part) for part in split(samples, 0.2)] == [1, 1]
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split(samples, share)


def test_parts_can_be_split_again():
    samples = open_samples([{"x": np.full((1, 3), n)} for n in np.arange(20.0)], [VECTOR])
    kept, _ = split(samples, 0.5)
    inner, held = split(kept, 0.2)
    assert sorted(firsts(inner) + firsts(held)) == firsts(kept)


@pytest.mark.parametrize("option", [{"tokenizer": "tokenizer.json"}, {"window": 8}])
def test_what_is_for_text_is_refused_with_arrays(tmp_path, option):
    path = save(tmp_path / "x.npz", x=numbered(4, (3,)))
    with pytest.raises(UserError, match="holds arrays"):
        open_samples(path, (VECTOR,), **option)
