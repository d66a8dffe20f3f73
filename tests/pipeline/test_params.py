"""params.yaml: what is refused, and in which words; what a profile does to the file."""

import copy
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.errors import UserError
from stages.pipeline import params
from stages.pipeline.params import yaml_files

ROOT = Path(__file__).parents[2]
VALID = params.read_yaml(ROOT / "params.yaml")


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "params.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(copy.deepcopy(values), file)
    return path


def changed(dotted: str, value: Any) -> dict[str, Any]:
    """The project's own parameters with one of them set; `...` removes it."""
    values = copy.deepcopy(VALID)
    *sections, key = dotted.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    if value is ...:
        del inner[key]
    else:
        inner[key] = value
    return values


def test_the_projects_own_parameters_are_valid(tmp_path: Path) -> None:
    loaded = params.load(write(tmp_path, VALID))
    cells = list(map(str, loaded.sweep.cells()))
    axes = (loaded.sweep.datasets, loaded.sweep.schedules, loaded.sweep.timesteps, loaded.sweep.seeds)
    assert len(cells) == len(set(cells)) == len(axes[0]) * len(axes[1]) * len(axes[2]) * len(axes[3])
    assert cells[0] == "-".join(str(axis[0]) for axis in axes)


MIX = {"reader": "mix", "of": dict.fromkeys("ab", VALID["data"]["persian_glyphs"])}


def mix(**changes: Any) -> dict[str, Any]:
    """A mix of two datasets, the second one changed."""
    return {"reader": "mix", "of": {"a": MIX["of"]["a"], "b": MIX["of"]["b"] | changes}}


def test_a_mix_is_as_wide_as_its_parts(tmp_path: Path) -> None:
    assert params.load(write(tmp_path, changed("data.both", MIX))).data["both"].size == 64


@pytest.mark.parametrize(
    ("dotted", "value", "says"),
    [
        ("train.epochs", 3, ["train.epochs is not a known key", "images, longer, batch"]),
        ("trian", {}, ["trian is not a known key", "sweep, data"]),
        ("data.mnist.pth", "x", ["data.mnist.pth is not a known key", "reader, size, path"]),
        ("train.lr", ..., ["train.lr is missing"]),
        ("train.images", "many", ["train.images.0 = 'many'", "integer"]),
        ("train.images", 1.5, ["train.images.0 = 1.5", "integer"]),
        ("train.images", [], ["train.images: []", "a number, or a list of two phases"]),
        ("sample.ancestral_images", 2001, ["sample: ancestral_images = 2001", "at most images = 2000"]),
        ("train.deterministic", 1, ["train.deterministic = 1", "boolean"]),
        ("train.lr", 0, ["train.lr = 0", "greater than 0"]),
        ("train.lr", float("nan"), ["train.lr = nan", "finite"]),
        ("train.label_dropout", 1.5, ["train.label_dropout = 1.5", "less than or equal to 1"]),
        ("train.images", [4000, 0], ["train.images.1 = 0", "greater than or equal to 1"]),
        ("train.longer", {"emnist": 2}, ["train.longer names 'emnist'", "mnist, persian_archive"]),
        ("train.longer", {"mnist": 0}, ["train.longer.mnist = 0", "greater than or equal to 1"]),
        ("sweep.timesteps", [1], ["sweep.timesteps.0 = 1", "greater than or equal to 2"]),
        ("sweep.timesteps", ["200"], ["sweep.timesteps.0 = '200'", "integer"]),
        ("sweep.schedules", [], ["sweep.schedules = []", "at least 1"]),
        ("sweep.seeds", [0, 0], ["sweep", "seeds = [0, 0]", "once"]),
        ("sweep.schedules", ["quadratic"], ["sweep.schedules.0 = 'quadratic'", "cosine, linear, linear_unscaled"]),
        ("sweep.timesteps", [10, 1000], ["sweep", "T = 10", "T > 20", "cosine"]),
        (
            "sweep",
            VALID["sweep"] | {"schedules": ["linear_unscaled"], "timesteps": [200, 20_000]},
            ["sweep", "'linear_unscaled' ends at alpha_bar = 1e-88 at T = 20000", "smaller T"],
        ),
        ("sweep.datasets", ["emnist"], ["sweep.datasets", "'emnist'", "mnist, persian_archive"]),
        ("sweep.datasets", ["MNIST-2"], ["sweep.datasets.0 = 'MNIST-2'", "a-z0-9_"]),
        ("sample.fast.steps", 201, ["sample.fast.steps = 201", "at most", "25"]),
        ("sample.fast.sampler", "euler", ["sample.fast.sampler = 'euler'", "ddim, ddpm, dpm_solver_pp_2m, heun"]),
        ("sample.fast.sampler", "__init__", ["sample.fast.sampler = '__init__'", "ddim, ddpm"]),
        ("sample.fast.sampler", "../samplers/ddim", ["sample.fast.sampler = '../samplers/ddim'", "ddim, ddpm"]),
        ("sample.fast.sampler", 3, ["sample.fast.sampler = 3", "string"]),
        ("sample.ancestral.sampler", "heun", ["sample.ancestral.sampler = 'heun'", "ddpm"]),
        ("train.label_dropout", 0.0, ["sample.guidance = 0.8", "train.label_dropout > 0", "sample.guidance: 0"]),
        ("sample.guidance_interval", [2.0, -4.0], ["sample: guidance_interval = [2.0, -4.0]", "rising"]),
        ("sample.guidance_interval", [2.0], ["sample.guidance_interval = [2.0]", "at least 2"]),
        ("sample.fast.spacing", "quadratic", ["sample.fast.spacing = 'quadratic'", "trailing"]),
        ("diffusion.weighting", "snr", ["diffusion.weighting = 'snr'", "min_snr"]),
        ("data.mnist.size", 32, ["data.mnist.size = 32", "28"]),
        ("data.mnist.reader", "idx", ["data.mnist", "mnist", "glyphs"]),
        ("data.persian_hoda.pth", "x", ["data.persian_hoda.pth is not a known key", "reader, path, size"]),
        ("data.persian_archive.sha256", "abc", ["data.persian_archive.sha256 = 'abc'", "[0-9a-f]{64}"]),
        ("data.persian_archive.url", "ftp://x", ["data.persian_archive.url = 'ftp://x'", "https?"]),
        ("data.persian_archive.test_share", 1.0, ["data.persian_archive.test_share = 1.0", "less than 1"]),
        ("data.persian_hoda.validation_share", 0.8, ["validation_share = 0.8 and test_share = 0.2", "less than 1 together"]),
        ("data.persian_archive.group", "w(", ["data.persian_archive.group: 'w(' is no regular expression: missing )"]),
        ("data.persian_archive.group", "w.", ["data.persian_archive.group: 'w.' must have one group, in brackets, not 0"]),
        ("data.persian_glyphs.validation_images", ..., ["data.persian_glyphs.validation_images is missing"]),
        ("evaluate.seed", -1, ["evaluate.seed = -1", "greater than or equal to 0"]),
        ("sweep.datasets", ["persian_hoda"], ["data.persian_hoda: say where its files are, in path"]),
        ("sweep.datasets", ["persian_archive"], ["data.persian_archive: say where its files are, in path or url or drive"]),
        ("data.both", {"reader": "mix", "of": {}}, ["data.both.of = {}", "at least 2"]),
        ("data.both", MIX | {"size": 3}, ["data.both.size is not a known key", "reader, of"]),
        ("data.both", mix(size=32), ["data.both: all datasets of a mix need one size, not a: 64, b: 32"]),
        ("data.both", mix(size="x"), ["data.both.of.b.size = 'x'", "integer"]),
        ("data.both", mix(pth="x"), ["data.both.of.b.pth is not a known key", "reader, size, train_images"]),
        ("network.attention_levels", [3], ["network", "attention_levels = [3]", "0..2"]),
        ("network.base_channels", 30, ["network.base_channels = 30", "multiple of 8"]),
        ("sample.images", 3, ["sample.images = 3", "greater than or equal to 4"]),
        ("sample.seed", -1, ["sample.seed = -1", "greater than or equal to 0"]),
        ("evaluate.min_scored", 3, ["evaluate.min_scored = 3", "greater than or equal to 4"]),
        ("sample.images", None, ["sample.images = None", "integer"]),
        ("sweep.timesteps", [10**30], [f"sweep.timesteps.0 = {10**30}", "less than or equal to 100000"]),
        ("sweep.timesteps", [10**9], ["sweep.timesteps.0 = 1000000000", "less than or equal to 100000"]),
        ("sweep.timesteps", list(range(200, 9200)), ["sweep.timesteps = [200, 201", "... (", "at most 1000 items"]),
        ("sweep.seeds", list(range(1000)) * 2, ["sweep.seeds = [0, 1", "at most 1000 items"]),
        ("sweep.seeds", [0, *range(900)], ["seeds = [0, 0, 1, 2", "... (", "once"]),
        ("sweep.seeds", [1e3], ["sweep.seeds.0 = 1000.0", "integer"]),
        ("sweep.seeds", ["0; touch PWNED"], ["sweep.seeds.0 = '0; touch PWNED'", "integer"]),
        ("sweep.datasets", ["mnist; touch PWNED"], ["sweep.datasets.0 = 'mnist; touch PWNED'", "a-z0-9_"]),
        ("sweep.datasets", ["$(id)"], ["sweep.datasets.0 = '$(id)'", "a-z0-9_"]),
        ("sweep.datasets", ["mnist\n"], ["sweep.datasets.0 = 'mnist\\n'", "a-z0-9_"]),
        ("sweep.datasets", ["a" * 300], ["sweep.datasets.0 = 'aaa", "at most 64 characters"]),
        ("sweep.schedules", ["`id`"], ["sweep.schedules.0 = '`id`'", "linear_unscaled"]),
        ("train.batch", 10**18, ["train.batch = 1000000000000000000", "less than or equal to 1000000000"]),
        ("train.images", 10**15, ["train.images.0 = 1000000000000000", "less than or equal to 1000000000"]),
        ("network.base_channels", 8 * 10**9, ["network.base_channels = 8000000000", "less than or equal to 4096"]),
        ("train.lr", 10**400, ["train.lr = 1000", "... (401 characters)", "valid number"]),
        ("sample.guidance_interval", [float("-inf"), float("inf")], ["sample.guidance_interval.0 = -inf", "finite"]),
        ("sample.guidance_interval", [0.0, float("nan")], ["sample.guidance_interval.1 = nan", "finite"]),
        ("evaluate.logsnr", [float("nan")], ["evaluate.logsnr.0 = nan", "finite"]),
        ("sample.fast.eta", float("nan"), ["sample.fast.eta = nan", "finite"]),
        ("train.ema_halflife", float("nan"), ["train.ema_halflife = nan", "finite"]),
        ("data.persian_hoda.test_share", float("nan"), ["data.persian_hoda.test_share = nan", "finite"]),
        ("runtime.checkpoint_seconds", float("inf"), ["runtime.checkpoint_seconds = inf", "finite"]),
        ("data.persian_archive.url", "ftp://me:hunter2@host/x", ["data.persian_archive.url = 'ftp://***@host/x'"]),
    ],
)
def test_a_mistake_is_refused_by_key_value_and_what_is_allowed(tmp_path: Path, dotted: str, value: Any, says: list[str]) -> None:
    path = write(tmp_path, changed(dotted, value))
    with pytest.raises(UserError, match=re.escape(f"{path}: ")) as refused:
        params.load(path)
    for words in says:
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fast": {"sampler": "heun", "eta": 0.5}}, ["sample.fast: eta = 0.5", "ddim alone", "'heun'"]),
        ({"diffusion": {"zero_terminal_snr": True, "prediction": "eps"}}, ["zero_terminal_snr = True", "'eps'", "v or x0"]),
        ({"diffusion": {"zero_terminal_snr": True}, "fast": {"spacing": "karras"}}, ["zero_terminal_snr = True", "'karras'"]),
        (
            {"diffusion": {"zero_terminal_snr": True}, "train": {"shared": True}},
            ["zero_terminal_snr = True", "train.shared: false"],
        ),
        (
            {"diffusion": {"zero_terminal_snr": True}, "fast": {"spacing": "trailing"}},
            ["zero_terminal_snr", "train.timesteps, 1000"],
        ),
        ({"train": {"shared": True, "timesteps": 1000}}, ["train.timesteps = 1000", "train.shared = True", "timesteps: null"]),
        ({"train": {"timesteps": 20}}, ["schedule 'linear' needs T > 20, not T = 20"]),
        ({"diffusion": {"zero_terminal_snr": True}, "fast": {"sampler": "heun"}}, ["zero_terminal_snr = True", "'heun'"]),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict[str, Any], says: list[str]) -> None:
    values = copy.deepcopy(VALID)
    values["diffusion"] |= changes.get("diffusion", {})
    values["train"] |= changes.get("train", {})
    values["sample"]["fast"] |= {"eta": 0.0} | changes.get("fast", {})
    with pytest.raises(UserError) as refused:
        params.load(write(tmp_path, values))
    for words in says:
        assert words in str(refused.value)


def test_every_mistake_is_told_on_a_line_of_its_own(tmp_path: Path) -> None:
    values = changed("train.lr", 0)
    values["sample"]["images"] = -1
    with pytest.raises(UserError, match=r"train\.lr.*\n.*sample\.images"):
        params.load(write(tmp_path, values))


@pytest.mark.parametrize(("text", "says"), [("a: [1", "is not YAML"), ("a: 1\na: 2", "is not YAML"), ("", "params.yaml")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(path))) as refused:
        params.load(path)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


OWN = (ROOT / "params.yaml").read_bytes()
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (BOMB.encode(), "aliases stand for too much"),
        (b"a: &a [*a]\n", "aliases stand for too much, or for themselves"),
        (b"a0: &a0 []\n" + b"".join(b"a%d: &a%d [*a%d]\n" % (i, i, i - 1) for i in range(1, 3000)), "aliases stand for too much"),
        (OWN.decode().encode("utf-16"), "save it as UTF-8"),
        (OWN.decode().encode("utf-16-le"), "special characters are not allowed"),
        (b"a: \xe9", "save it as UTF-8"),
        (OWN + b"\0", "special characters are not allowed"),
        (b"[" * 50_000, "nested too deeply"),
        (b"a: " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b"a: " + b"{a: " * 5000, "nested too deeply"),
        (b"- " * 5000, "nested too deeply"),
        (b"# many\n" * 2_000_000, "14,000,000 bytes, more than the 100,000 allowed"),
        (b"a:\n\tb: 1", "cannot start any token"),
        (b"a: !!python/object:os.system x", "could not determine a constructor"),
        (b"a: 1\na: 2", "duplicate key"),
        (OWN + b"1: x\n", "1 is no text; keys must be names"),
        (OWN + b"null: x\n", "None is no text; keys must be names"),
        (OWN + b"[a]: x\n", "('a',) is no text; keys must be names"),
        (OWN + b"? {a: 1}\n: b\n", "unhashable key"),
        (b"a: 2024-13-45", "month must be in 1..12"),
        (b"a: !!int x", "invalid literal"),
        (b"a: !!bool x", "is not YAML"),
        (b'a: "\\Uffffffff"', "is not YAML"),
        (b"a: " + b"9" * 5000, "4300 digits"),
        (OWN.replace(b"batch: 64", b"batch: 0x" + b"f" * 9000), "train.batch = a int too long to show"),
        (OWN.replace(b"timesteps: [25, 100, 1000]", b"timesteps: [" + b"x," * 9000 + b"]"), "at most 1000 items"),
        (
            OWN.replace(b"seeds: [0]", f"seeds: {[*range(501)]}".encode()).replace(
                b"[25, 100, 1000]", b"[200, 300, 400, 500, 600]"
            ),
            "10,000",
        ),
        (b"- 1", "the whole = [1]"),
    ],
    ids=range(28),
)
def test_hostile_yaml_is_refused_in_one_short_line_in_a_second(tmp_path: Path, content: bytes, says: str) -> None:
    for path, read in (
        (tmp_path / "params.yaml", params.load),
        (tmp_path / "mine.yaml", lambda p: params.merged(p, ROOT / "params.yaml")),
    ):
        path.write_bytes(content)
        started = time.process_time()
        with pytest.raises(UserError, match=re.escape(str(path))) as refused:
            read(path)
        assert time.process_time() - started < 3  # on a busy machine too
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 1000
        if path.name == "params.yaml":
            assert says in str(refused.value)


def test_of_many_mistakes_the_first_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        params.load(write(tmp_path, changed("sweep.seeds", ["x"] * 900)))
    lines = str(refused.value).splitlines()
    assert len(lines) == yaml_files.MOST_MISTAKES + 1
    assert "880 mistakes more" in lines[-1]


def test_the_most_timesteps_are_checked_in_a_second(tmp_path: Path) -> None:
    values = changed("sweep.timesteps", list(range(99_001, 100_001)))
    started = time.process_time()
    params.Params.model_validate(values)
    assert time.process_time() - started < 2


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"\xef\xbb\xbf" + OWN)
    assert params.load(tmp_path / "params.yaml") == params.load(ROOT / "params.yaml")
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbftrain: {batch: 32}")
    assert "batch: 32" in params.merged(tmp_path / "mine.yaml", tmp_path / "params.yaml")


def test_a_folder_is_no_parameters(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        params.load(tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="root of the repository"):
        params.load(tmp_path / "params.yaml")


def test_an_unknown_cell_is_refused(tmp_path: Path) -> None:
    loaded = params.load(write(tmp_path, VALID))
    name = str(next(loaded.sweep.cells()))
    assert str(params.find_cell(loaded, name)) == name
    with pytest.raises(UserError, match=f"no cell 'mnist-cosine-7-0'; it has: {name}"):
        params.find_cell(loaded, "mnist-cosine-7-0")


@pytest.mark.parametrize("profile", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_profile_changes_its_values_and_keeps_every_comment(profile: Path, tmp_path: Path) -> None:
    text = params.merged(profile, ROOT / "params.yaml")
    (tmp_path / "params.yaml").write_text(text)
    loaded = params.load(tmp_path / "params.yaml").model_dump()

    def assert_holds(values: dict[str, Any], wanted: dict[str, Any]) -> None:
        for key, value in wanted.items():
            if isinstance(value, dict):
                assert_holds(values[key], value)
            else:
                assert values[key] == value, key

    assert_holds(loaded, params.read_yaml(profile))
    before = (ROOT / "params.yaml").read_text()
    comments = [line.partition("#")[2] for line in before.splitlines()]
    assert [line.partition("#")[2] for line in text.splitlines()] == comments


@pytest.mark.parametrize("longer", ["{}", "{mnist: 3}", "{persian_hoda: 2, mnist: 3}"])
def test_a_profile_says_anew_which_datasets_train_longer(tmp_path: Path, longer: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"train: {{longer: {longer}}}")
    text = params.merged(tmp_path / "mine.yaml", ROOT / "params.yaml")
    assert re.search(rf"\n  longer: {re.escape(longer)} +# ", text)
    assert len(text.splitlines()) == len((ROOT / "params.yaml").read_text().splitlines())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {epochs: 3}", "train.epochs is no key"),
        ("trian: {images: 3}", "trian is no key"),
        ("train: {lr: -1.0}", "train.lr = -1.0"),
        ("train: 3", "train"),
        ("[1]", "must map sections"),
        ("sample: {fast: {steps: {a: 1}}}", "sample.fast.steps"),
    ],
)
def test_a_wrong_profile_is_refused(tmp_path: Path, text: str, says: str) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(profile))) as refused:
        params.merged(profile, ROOT / "params.yaml")
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ({"reader": "auto", "path": "x"}, {"size": None, "pad": True, "invert": False, "licence": "unknown"}),
        ({"reader": "folder", "path": "x", "size": 32}, {"pad": False, "group": None, "strict": False}),
        ({"reader": "archive", "url": "https://x", "size": 32}, {"path": None, "drive": None, "sha256": None, "pad": False}),
        ({"reader": "hoda", "path": "x", "size": 32}, {"validation_share": 0.15, "test_share": 0.2, "seed": 0}),
        ({"reader": "mnist"}, {"size": 28, "path": None}),
    ],
)
def test_keys_that_a_reader_can_do_without_may_be_left_out(tmp_path: Path, short: dict[str, Any], full: dict[str, Any]) -> None:
    values = changed("data.mine", short)
    values["sweep"]["datasets"] = ["mine"]
    section = params.load(write(tmp_path, values)).data["mine"]
    assert section.model_dump() == section.model_dump() | short | full
    assert section.model_dump(exclude_unset=True) == short, "what DVC records"


def test_a_dataset_in_a_mix_says_its_size(tmp_path: Path) -> None:
    mixed = {"reader": "mix", "of": {"a": MIX["of"]["a"], "b": {"reader": "auto", "path": "x"}}}
    with pytest.raises(UserError, match=r"data\.both: all datasets of a mix need one size; say that of b$"):
        params.load(write(tmp_path, changed("data.both", mixed)))
    mixed["of"]["b"]["size"] = 64
    assert params.load(write(tmp_path, changed("data.both", mixed))).data["both"].size == 64


SECTION = {"reader": "auto", "path": '/a/it\'s "b" # c', "size": 48, "invert": False, "pad": True}


def test_a_dataset_is_added_to_the_file_and_nothing_else_changes(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(OWN)
    text = params.with_dataset("mine", SECTION, path)
    assert path.read_bytes() == OWN, "it is not written"
    added = text.splitlines()
    for line in OWN.decode().replace("[mnist, persian_glyphs]", "[mnist, persian_glyphs, mine]").splitlines():
        added.remove(line)
    indented = ["reader: auto", 'path: "/a/it\'s \\"b\\" # c"', "size: 48", "invert: false", "pad: true"]
    assert added == ["  mine:", *(f"    {line}" for line in indented)]
    path.write_text(text, encoding="utf-8")
    assert params.load(path).data["mine"].model_dump(exclude_unset=True) == SECTION
    assert params.with_dataset("mine", {}, path) == text, "there it is already"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("[mnist, persian_glyphs]", "\n  - mnist # the first\n  - persian_glyphs # the last"),
        lambda text: text.replace("[mnist, persian_glyphs]", "[\n    mnist, # [one]\n    persian_glyphs,\n  ]"),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\nextractor:", "\n# About the extractor\nextractor:"),
        lambda text: re.sub(
            r"\ndata:.*?\nextractor",
            "\ndata:\n  mnist: {reader: mnist} # x\n  persian_glyphs: {reader: mnist}\nextractor",
            text,
            flags=re.S,
        ),
        lambda text: (lambda data: text.replace(data, "") + data.rstrip("\n"))(
            re.search(r"\ndata:.*?\n(?=extractor)", text, re.S)[0]
        ),
    ],
    ids=["block", "broken", "crlf", "bom", "remark", "flow", "last"],
)
def test_a_dataset_is_added_however_the_file_is_written(tmp_path: Path, change: Callable[[str], str]) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(change(OWN.decode()).encode())
    before, remarks = params.read_yaml(path), re.findall(r"#[^\r\n]*", path.read_text(encoding="utf-8"))
    text = params.with_dataset("mine", SECTION, path)
    path.write_bytes(text.encode())
    before["sweep"]["datasets"].append("mine")
    before["data"]["mine"] = SECTION
    assert params.read_yaml(path) == before
    assert [remark for remark in re.findall(r"#[^\r\n]*", text) if '# c"' not in remark] == remarks
    assert ("\r\n" in text) == (text.count("\n") == text.count("\r\n"))


@pytest.mark.parametrize(("name", "section"), [("No", SECTION), ("mine", SECTION | {"size": 3})])
def test_a_dataset_that_is_not_valid_is_not_added(tmp_path: Path, name: str, section: dict[str, Any]) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(OWN)
    with pytest.raises(UserError, match=r"params\.yaml: (data|sweep\.datasets)\."):
        params.with_dataset(name, section, path)


def test_a_file_that_cannot_be_added_to_is_told_with_what_to_add(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(
        re.sub(
            r"\ndata:.*?\nextractor",
            "\ndata: {mnist: {reader: mnist}, persian_glyphs: {reader: mnist}}\nextractor",
            OWN.decode(),
            flags=re.S,
        )
    )
    with pytest.raises(UserError, match=r"add `mine: \{reader: auto, path: .*pad: true\}` to data, and mine to sweep\.datasets$"):
        params.with_dataset("mine", SECTION, path)
