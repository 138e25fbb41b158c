"""The settings reader: a case for each behaviour of fastargs that it relies on or replaces."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from fastargs import Config, Param, Section

from fast_imagenet.config import Bool, Int, Number, OneOf, Str, interpreter, read_config, to_dict

REPOSITORY = Path(__file__).resolve().parents[1]


def declare() -> Config:
    """A small set of settings, one of each kind."""
    settings = Config()
    Section("data", "where images come from", settings).params(
        train_dataset=Param(Str(), "the file, 50% JPEG", default="data/train.beton"),
        backend=Param(OneOf("ffcv", "torchvision", "none"), "who loads", default="ffcv"),
        num_workers=Param(Int(0), "0 = all", default=0),
    )
    Section("lr", "learning rate", settings).params(
        lr=Param(Number(0, 100), "peak", default=0.125),
        warmup=Param(Bool(), "grow first", default=True),
    )
    Section("training", "optimisation", settings).params(
        epochs=Param(Int(1), "passes over the data", default=16),
        batch_size=Param(Int(1), "images a step", default=256),
    )
    return settings


def read(*words: str, settings: Config | None = None, **kwargs) -> SimpleNamespace:
    kwargs = {"prog": "train.py", "description": "Train.", **kwargs}
    return read_config(settings or declare(), list(words), **kwargs)


@pytest.fixture
def write(tmp_path):
    """write(text, name) -> path as text of a new YAML file."""

    def write(text: str, name: str = "a.yaml") -> str:
        (tmp_path / name).write_text(textwrap.dedent(text).lstrip("\n") + "\n")
        return str(tmp_path / name)

    return write


@pytest.fixture
def refused(capsys):
    """refused(*words) -> the text on stderr, after checking exit status 2 and a silent stdout."""

    def refused(*words: str, **kwargs) -> str:
        with pytest.raises(SystemExit) as stopped:
            read(*words, **kwargs)
        out, err = capsys.readouterr()
        assert stopped.value.code == 2
        assert out == ""
        assert all(letter.isprintable() or letter == "\n" for letter in err), repr(err)
        return err

    return refused


# ------------------------------------------------------------------------------------------------
# Order of precedence
# ------------------------------------------------------------------------------------------------


def test_defaults_alone():
    cfg = read()
    assert to_dict(cfg) == {
        "data": {"train_dataset": "data/train.beton", "backend": "ffcv", "num_workers": 0},
        "lr": {"lr": 0.125, "warmup": True},
        "training": {"epochs": 16, "batch_size": 256},
    }
    assert isinstance(cfg.training.epochs, int)


def test_files_from_left_to_right_then_flags(write):
    first = write("training: {epochs: 30, batch_size: 64}\nlr: {lr: 1.0}", "first.yaml")
    second = write("training: {epochs: 40}", "second.yaml")
    cfg = read("--lr.lr=7", "--config", first, "--config", second)
    assert (cfg.training.epochs, cfg.training.batch_size, cfg.lr.lr) == (40, 64, 7.0)
    assert read("--config", second, "--config", first).training.epochs == 30


@pytest.mark.parametrize("option", ["--config", "--config-file", "-C"])
@pytest.mark.parametrize("joined", [True, False])
def test_every_spelling_of_config(write, option, joined):
    path = write("training: {epochs: 3}")
    words = [f"{option}={path}"] if joined else [option, path]
    assert read(*words).training.epochs == 3


def test_short_option_glued_to_its_file_keeps_the_order(write):
    first = write("training: {epochs: 3}", "first.yaml")
    second = write("training: {epochs: 5}", "second.yaml")
    assert read(f"-C{first}", "--config-file", second).training.epochs == 5


def test_last_flag_wins_and_spaces_or_equals_are_the_same():
    assert read("--training.epochs=3", "--training.epochs", "4").training.epochs == 4


def test_environment_variables_have_no_effect(monkeypatch):
    monkeypatch.setenv("training.epochs", "99")
    monkeypatch.setenv("TRAINING_EPOCHS", "99")
    monkeypatch.setenv("lr.lr", "55")
    cfg = read("--lr.lr=7")
    assert (cfg.training.epochs, cfg.lr.lr) == (16, 7.0)


def test_one_reading_leaves_nothing_behind_for_the_next(write):
    settings = declare()
    read("--training.epochs=3", "--config", write("lr: {lr: 9}"), settings=settings)
    cfg = read(settings=settings)
    assert (cfg.training.epochs, cfg.lr.lr) == (16, 0.125)


def test_result_survives_pickle():
    cfg = read("--training.epochs=3")
    assert pickle.loads(pickle.dumps(cfg)) == cfg


def test_resolved_tree_written_as_yaml_reads_back(write):
    cfg = read("--lr.lr=1e-5", "--data.train_dataset=010", "--lr.warmup=no")
    assert read("--config", write(yaml.safe_dump(to_dict(cfg)))) == cfg


def printed(capsys, *words: str, **kwargs) -> str:
    """What is printed in place of a run, with exit status 0."""
    with pytest.raises(SystemExit) as stopped:
        read(*words, **kwargs)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_print_config_is_a_config_of_the_same_settings(capsys, write):
    file = write("lr: {lr: 1e-5}")
    words = ["-C", file, "--data.train_dataset=a: # 'ü' \\ " + "b " * 60]
    text = printed(capsys, "--print-config", *words, check=lambda cfg: ["not asked"])
    again = write(text, "again.yaml")
    assert read("--config", again) == read(*words)
    assert f"  lr: 1.0e-05  # {file} line 1\n" in text
    lines = printed(capsys, "--config", again, "--print-config").splitlines()
    assert all("again.yaml line" in line for line in lines if line.startswith(" "))


def test_print_config_refuses_what_no_run_takes(refused):
    assert "must be a number" in refused("--print-config", "--lr.lr=x")


def test_a_short_flag_stands_for_a_setting(refused):
    kwargs = {"switches": {"--long": "--training.epochs=90"}}
    assert read("--long", **kwargs).training.epochs == 90
    assert read("--long", "--training.epochs=91", **kwargs).training.epochs == 91
    assert "--long is not a setting" in refused("--long").replace("'", "")


def test_list_configs_needs_configs(refused, capsys, tmp_path):
    (tmp_path / "a_10.yaml").write_text(
        "# Expected: top-1 7.5. More.\n# Time: 3 hours with evaluation\n"
    )
    (tmp_path / "a_9.yaml").write_text("lr: {lr: 1}")
    lines = printed(capsys, "--list-configs", search=[tmp_path]).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["a_9", "a_10"]
    assert "3 hours; expected: top-1 7.5" in lines[2] and "More" not in lines[2]
    assert "is not a setting" in refused("--list-configs")


def test_a_setting_without_default_is_none_when_not_given():
    settings = declare()
    Section("extra", "", settings).params(note=Param(Str(), "free"))
    assert read(settings=settings).extra.note is None
    assert read("--extra.note=x", settings=settings).extra.note == "x"


# ------------------------------------------------------------------------------------------------
# Values
# ------------------------------------------------------------------------------------------------

GOOD_VALUES = [
    (Int(0), "16", 16),
    (Int(0), "010", 10),
    (Int(-5, 5), "-5", -5),
    (Int(1), 3, 3),
    (Number(), "1e-4", 1e-4),
    (Number(), "1e3", 1000.0),
    (Number(0), 3, 3.0),
    (Number(0, 1), "1", 1.0),
    (Number(0), ".5", 0.5),
    (Bool(), "false", False),
    (Bool(), "0", False),
    (Bool(), "No", False),
    (Bool(), "OFF", False),
    (Bool(), "true", True),
    (Bool(), "1", True),
    (Bool(), "yes", True),
    (Bool(), "on", True),
    (Bool(), False, False),
    (OneOf("no", "yes"), "no", "no"),
    (Str(), "", ""),
    (Str(), "18", "18"),
]
BAD_VALUES = [
    (Int(0), "16.9"),
    (Int(0), 16.9),
    (Int(0), True),
    (Int(0), "true"),
    (Int(0), "1_000"),
    (Int(0), "1e3"),
    (Int(0), ""),
    (Int(0), "9" * 5000),
    (Int(0), "9" * 19),
    (Int(0), "٣"),  # an Arabic digit, which int() takes
    (Int(1), "0"),
    (Int(0, 9), "10"),
    (Number(), "nan"),
    (Number(), "inf"),
    (Number(), "-.inf"),
    (Number(), "1e999"),
    (Number(), "1_0"),
    (Number(), "e"),
    (Number(), True),
    (Number(0), "-1"),
    (Number(0, 1), "1.01"),
    (Bool(), "2"),
    (Bool(), ""),
    (Bool(), "maybe"),
    (OneOf("a", "b"), "c"),
    (OneOf("a", "b"), "A"),
    (Str(empty=False), ""),
    (Str(), "two\nlines"),
    (Str(), "\x1b[31m"),
]


@pytest.mark.parametrize(("checker", "value", "expected"), GOOD_VALUES)
def test_good_values(checker, value, expected):
    result = checker.check(value)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(("checker", "value"), BAD_VALUES)
def test_bad_values(checker, value):
    with pytest.raises(ValueError, match=r"\w"):
        checker.check(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("no", False), ("'false'", False), ("on", True), ("True", True), ("0", False)],
)
def test_yaml_and_flags_read_booleans_alike(write, text, expected):
    assert read("--config", write(f"lr:\n  warmup: {text}")).lr.warmup is expected
    assert read(f"--lr.warmup={text.strip(chr(39))}").lr.warmup is expected


@pytest.mark.parametrize(("text", "expected"), [("010", 10), ("'7'", 7), ("+3", 3)])
def test_yaml_numbers_are_read_as_they_stand(write, text, expected):
    assert read("--config", write(f"training:\n  epochs: {text}")).training.epochs == expected


@pytest.mark.parametrize("text", ["1:30", "16.9", "true", "0x10", "1_0", "2026-01-01", "1e3"])
def test_yaml_values_that_only_look_like_a_number(refused, write, text):
    error = refused("--config", write(f"training:\n  epochs: {text}"))
    assert f"line 2: training.epochs = '{text}': must be a whole number >= 1" in error
    assert "the default is 16" in error


def test_yaml_exponents_and_word_choices(write):
    cfg = read("--config", write("lr: {lr: 1e-4}\ndata: {backend: none, train_dataset: 18}"))
    assert (cfg.lr.lr, cfg.data.backend, cfg.data.train_dataset) == (1e-4, "none", "18")


def test_an_error_names_the_value_the_rule_and_the_fix(refused):
    error = refused("--data.backend=fcv", "--lr.lr=nan")
    assert "data.backend = 'fcv': must be one of ffcv, torchvision, none" in error
    assert "did you mean ffcv?" in error
    assert "lr.lr = 'nan': must be a number from 0 to 100; the default is 0.125" in error


def test_an_overridden_value_must_be_valid_too(refused, write):
    error = refused("--training.epochs=3", "--config", write("training:\n  epochs: -1"))
    assert "1 problem in" in error
    assert "line 2: training.epochs = '-1'" in error


def test_control_characters_are_escaped_and_long_values_are_cut(refused):
    error = refused("--lr.lr=\x1b[31mred", f"--training.epochs={'9' * 5000}")
    assert r"'\x1b[31mred'" in error
    assert max(map(len, error.splitlines())) < 200


# ------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--training.epochz=3", "did you mean training.epochs?"),
        ("--training.epoch", "did you mean training.epochs?"),
        ("--epochs=3", "did you mean training.epochs?"),
        ("--trainning.epochs=3", "did you mean training.epochs?"),
        ("--training.batch-size=3", "did you mean training.batch_size?"),
        ("--lr=3", "did you mean lr.lr?"),
        ("--data.num=3", "did you mean data.num_workers"),
        ("--qqq=3", "see --help"),
        ("--lr.l=3", "did you mean lr.lr"),
        ("demo.yaml", "write --config demo.yaml"),
        ("-x", "write --section.key=value"),
        ("--", "write --section.key=value"),
    ],
)
def test_unknown_words_and_prefixes_are_refused_with_the_nearest_name(refused, word, hint):
    error = refused(word)
    assert repr(word) in error
    assert hint in error


def test_the_value_of_an_unknown_flag_is_no_second_problem(refused):
    assert "1 problem in" in refused("--training.epochz", "3")


@pytest.mark.parametrize("words", [["--lr.lr"], ["--lr.lr", "--training.epochs=3"], ["--config"]])
def test_a_flag_without_value(refused, words):
    assert f"{words[0]}: a value must follow" in refused(*words)


def test_negative_numbers_may_follow_a_space():
    settings = declare()
    Section("extra", "", settings).params(shift=Param(Number(), "", default=0.0))
    assert read("--extra.shift", "-1.5", settings=settings).extra.shift == -1.5


def test_unknown_yaml_keys_are_refused(refused, write):
    text = """
        training:
          epochz: 3
        trainng:
          epochs: 3
        whatever: 1
        """
    error = refused("--config", write(text))
    assert "line 2: 'training.epochz' is not a setting; did you mean training.epochs?" in error
    assert "line 3: 'trainng' is not a setting; did you mean training?" in error
    assert "line 5: 'whatever' is not a setting; see --help" in error


def test_quotes_make_text_of_null_and_nothing(write):
    text = 'data:\n  train_dataset: "null"\n'
    assert read("--config", write(text)).data.train_dataset == "null"
    assert read("--config", write(text.replace("null", ""))).data.train_dataset == ""


def test_dotted_keys_and_nested_sections(write):
    settings = declare()
    Section("train.optim", "nested", settings).params(momentum=Param(Number(0, 1), "", default=0.9))
    path = write("train.optim.momentum: 0.5\nlr.lr: 3")
    cfg = read("--config", path, settings=settings)
    assert (cfg.train.optim.momentum, cfg.lr.lr) == (0.5, 3.0)
    path = write("train:\n  optim:\n    momentum: 0.25")
    assert read("--config", path, settings=settings).train.optim.momentum == 0.25
    assert read("--train.optim.momentum=0", settings=settings).train.optim.momentum == 0.0


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "# only a comment", "---", "null", "training:", "training: {}"]
)
def test_empty_files_and_sections_change_nothing(write, text):
    assert read("--config", write(text)) == read()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 3", "line 1: lr = '3': lr is a section"),
        ("lr: [1, 2]", "lr is a section"),
        ("training:\n  epochs: {a: 1}", "line 2: training.epochs is one value, not a section"),
        ("training:\n  epochs: [1, 2]", "line 2: training.epochs is one value, not a list"),
        ("training:\n  epochs:", "line 2: training.epochs is empty"),
        ("training:\n  epochs: null", "line 2: training.epochs is empty"),
        ("training:\n  epochs: ~", "line 2: training.epochs is empty"),
        ("- training", "holds no settings"),
        ("training", "holds no settings"),
        ("? [a, b]\n: 3", "line 1: a key must be a word"),
        ("1: 3", "line 1: '1' is not a setting"),
        ("training: {epochs: 3", "line 2: expected ',' or '}'"),
        ("training:\n\tepochs: 3", "line 2: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 2", "line 2: but found another document"),
        ("training: {epochs: 3, epochs: 4}", "training.epochs is in line 1 already"),
        ("lr: {lr: 1}\nlr.lr: 2", "line 2: lr.lr is in line 1 already"),
        ("lr: {lr: 1}\nlr: {warmup: no}", "line 2: lr is in line 1 already"),
        ("lr: &a {lr: 1}\ntraining: *a", "line 2: alias *a: aliases are not read"),
        ("lr: {<<: {lr: 1}}", "'lr.<<' is not a setting"),
        ("training:\n  epochs: !!python/name:os.system ''", "has no meaning here"),
    ],
)
def test_files_that_cannot_be_meant(refused, write, text, message):
    path = write(text)
    error = refused("--config", path)
    assert message in error
    assert path in error
    assert "Traceback" not in error


def test_aliases_cannot_fill_the_memory(refused, write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "aliases are not read" in refused("--config", write("\n".join(lines)))


def test_deep_nesting_is_an_error_not_a_crash(refused, write):
    assert "nested too deeply" in refused("--config", write("a: " + "[" * 20_000))


def test_files_that_are_no_text(refused, tmp_path):
    binary, huge = tmp_path / "binary.yaml", tmp_path / "huge.yaml"
    binary.write_bytes(b"lr:\n  lr: \xff\xfe\n")
    huge.write_bytes(b"# padding\n" * 100_001)
    (tmp_path / "nul.yaml").write_bytes(b"lr: \x00")
    assert "byte 10 is not UTF-8 text" in refused("--config", str(binary))
    assert "larger than 100,000 bytes" in refused("--config", str(huge))
    assert "larger than 100,000 bytes" in refused("--config", "/dev/zero")
    assert "special characters are not allowed" in refused("--config", str(tmp_path / "nul.yaml"))
    assert "Is a directory" in refused("--config", str(tmp_path))


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "dos.yaml").write_bytes(b"\xef\xbb\xbflr:\r\n  lr: 3\r\n")
    assert read("--config", str(tmp_path / "dos.yaml")).lr.lr == 3.0


def test_bare_names_are_looked_up(refused, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shelf, other = tmp_path / "rn50_configs", tmp_path / "rn18_configs"
    for folder in (shelf, other):
        folder.mkdir()
    (shelf / "rn50_16_epochs.yaml").write_text("training: {epochs: 7}")
    search = [shelf, other]
    for name in ("rn50_16_epochs.yaml", "rn50_16_epochs"):
        assert read("--config", name, search=search).training.epochs == 7
    (tmp_path / "rn50_16_epochs").mkdir()  # a folder of that name is no config
    assert read("--config", "rn50_16_epochs", search=search).training.epochs == 7
    error = refused("--config", "rn50_16_epoch.yaml", search=search)
    assert "no such file here, nor in rn50_configs/, nor in rn18_configs/" in error
    assert "did you mean rn50_16_epochs.yaml?" in error
    for name in ("rn50_16", "rn5_16_epochs"):
        assert "did you mean rn50_16_epochs.yaml?" in refused("--config", name, search=search)
    assert "--list-configs" in refused("--config", "xyz", search=search)
    assert "No such file" in refused("--config", "elsewhere/rn50_16_epochs.yaml", search=search)
    (other / "rn50_16_epochs.yaml").write_text("")
    assert "found more than once" in refused("--config", "rn50_16_epochs.yaml", search=search)
    write("training: {epochs: 9}", "rn50_16_epochs.yaml")
    assert read("--config", "rn50_16_epochs.yaml", search=search).training.epochs == 9


# ------------------------------------------------------------------------------------------------
# Everything at once, and the checks of the script
# ------------------------------------------------------------------------------------------------


def test_all_problems_are_reported_together(refused, write):
    text = """
        training:
          epochs: 16.9
          batchsize: 3
        lr: 3
        data: {backend: dali}
        """
    error = refused(
        "--config", write(text), "--config", "missing.yaml", "--lr.lr=-1", "--lr.warmup=maybe", "-q"
    )
    expected = ["epochs = '16.9'", "'training.batchsize'", "lr is a section", "'dali'",
                "missing.yaml", "lr.lr = '-1'", "lr.warmup = 'maybe'", "'-q'"]  # fmt: skip
    assert [word for word in expected if word not in error] == []
    assert "8 problems in the settings, nothing was started" in error
    assert error.count("\n") == 10
    assert f"`{interpreter()} train.py --help`" in error


def test_check_runs_on_valid_settings_only_and_is_reported_the_same_way(refused):
    seen = []

    def check(cfg):
        seen.append(cfg)
        return ["training.batch_size=3 does not divide"] if cfg.training.batch_size == 3 else []

    assert read(check=check).training.epochs == 16
    assert "1. training.batch_size=3 does not divide" in refused(
        "--training.batch_size=3", check=check
    )
    refused("--training.epochs=x", check=check)
    assert len(seen) == 2


@pytest.mark.parametrize("script", ["train_imagenet", "write_dataset"])
def test_every_default_passes_the_checker_of_its_setting(script):
    """None of them is fastargs' own, which reads "false" as true."""
    for key, param in importlib.import_module(script).SETTINGS.entries.items():
        assert type(param.checker).__module__ == Bool.__module__, key
        assert param.checker.check(param.default) == param.default, key


def test_only_one_rank_of_a_node_speaks(capsys, monkeypatch):
    for rank, lines in (("0", 3), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            read("--lr.lr=-1")
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == lines


# ------------------------------------------------------------------------------------------------
# Help, and the command as a process
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_is_complete_plain_and_stable(capsys, word):
    texts = []
    for words in ([word], ["--config", "missing.yaml", word, "--nonsense"]):
        with pytest.raises(SystemExit) as stopped:
            read(*words, search=[Path("rn50_configs")])
        assert stopped.value.code == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert all(letter.isprintable() or letter == "\n" for letter in texts[0])
    assert max(map(len, texts[0].splitlines())) <= 100
    for key in (
        "--data.train_dataset",
        "--lr.warmup",
        "--training.batch_size",
        "-C",
        "rn50_configs/",
    ):
        assert key in texts[0]
    assert "the file, 50% JPEG [text; default data/train.beton]" in texts[0]
    assert "[one of ffcv, torchvision, none; default ffcv]" in texts[0]
    assert "[a number from 0 to 100; default 0.125]" in texts[0]


SCRIPT = """
import sys
sys.path.insert(0, {repository!r})
from fastargs import Config, Param, Section
from fast_imagenet.config import Int, read_config
settings = Config()
Section("training", "", settings).params(epochs=Param(Int(1), "", default=16))
print(read_config(settings, prog="s.py", description="S.").training.epochs)
heavy = [name for name in ("torch", "ffcv", "numpy", "numba", "cv2") if name in sys.modules]
assert not heavy, heavy
"""


def run_script(tmp_path, command: str) -> subprocess.CompletedProcess:
    script = tmp_path / "s.py"
    script.write_text(SCRIPT.format(repository=str(REPOSITORY)))
    return subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PYTHON": sys.executable, "SCRIPT": str(script)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_as_a_process_nothing_heavy_and_process_substitution(tmp_path):
    done = run_script(
        tmp_path, '"$PYTHON" -W error "$SCRIPT" --config <(echo "training: {epochs: 3}")'
    )
    assert (done.stdout, done.stderr, done.returncode) == ("3\n", "", 0)


def test_as_a_process_exit_status_two(tmp_path):
    done = run_script(tmp_path, '"$PYTHON" "$SCRIPT" --training.epochs=16.9')
    assert (done.stdout, done.returncode) == ("", 2)
    assert "training.epochs = '16.9': must be a whole number >= 1" in done.stderr


def test_a_file_of_another_kind_is_reported_soon_and_in_few_lines(write, refused):
    text = refused(
        "--config", write("training:\n" + "".join(f"  key{i}: 1\n" for i in range(5000)))
    )
    assert "50 problems and perhaps more in the settings" in text and len(text.splitlines()) == 52


def test_a_list_in_place_of_a_section(write, refused):
    text = refused("--config", write("training: [1, 2]"))
    assert "training = a list: training is a section" in text
