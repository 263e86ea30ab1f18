import json

import numpy as np
import pytest
import typer
from safetensors.numpy import save_file
from typer.testing import CliRunner

from llmrec.cli.scale_cost import cost
from llmrec.data.sample import make_sample
from llmrec.exceptions import DataError
from llmrec.scaling import probing, throughput
from llmrec.scaling.cost import cost_of
from llmrec.scaling.language import LanguageShape
from llmrec.scaling.shape import Shape
from llmrec.sequence.arguments import EncoderArguments

APP = typer.Typer()
APP.command()(cost)


def call(*words):
    return CliRunner().invoke(APP, [str(word) for word in words])


def account(tmp_path, *words):
    path = tmp_path / "cost.json"
    done = call(*words, "--json", path)
    assert done.exit_code == 0, done.output + repr(done.exception)
    return json.loads(path.read_text()), done.output


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "log.csv"
    make_sample(0, 120, 150)[0].write_csv(path)
    return path


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    """Codes of twelve items, of 10, 5 and 2 words."""
    folder = tmp_path_factory.mktemp("ids")
    codes = np.stack(np.unravel_index(np.arange(12), (10, 5, 2)), axis=1).astype(np.int32)
    save_file({"codes": codes}, folder / "codes.safetensors")
    (folder / "semantic_ids.json").write_text('{"codebook_sizes": [10, 5, 2]}')
    (folder / "items.jsonl").write_text("".join(f'{{"item_id": "{item}", "title": "t"}}\n' for item in range(12)))
    return folder


def test_the_issue_s_example(tmp_path):
    found, shown = account(
        tmp_path, "--encoder", "hstu", "--depth", 8, "--width", 64, "--items", 3706, "--tokens", "1e6"
    )
    expected = cost_of(Shape("hstu", 8, 64, 3706, 50))
    assert found["parameters"] == expected.parameters
    assert found["flops"] == pytest.approx(expected.flops(1e6))
    assert found["activation_bytes"] == pytest.approx(expected.activation_bytes(128))
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert (found["probe"], found["seconds"]) == (None, None)
    assert f"{expected.parameters:,}" in shown
    assert "utilisation" not in shown


def test_flags_are_the_encoder_s(tmp_path):
    given = ["--encoder", "sasrec", "--depth", 2, "--width", 32, "--items", 500, "--tokens", 1000, "--epochs", 3]
    flags = ["--flag", "residual=llama", "--flag", "gate=true", "--flag", "inner=48", "--heads", 2]
    found, _ = account(tmp_path, *given, *flags, "--negatives", 16, "--batch", 4, "--length", 20)
    shape = Shape("sasrec", 2, 32, 500, 20, 2, 16, residual="llama", gate=True, inner=48)
    assert found["parameters"] == cost_of(shape).parameters
    assert found["flops"] == pytest.approx(cost_of(shape).flops(1000, 3))
    assert found["activation_bytes"] == pytest.approx(cost_of(shape).activation_bytes(4))


def test_a_language_model(tmp_path):
    given = ["--encoder", "lm:qwen3", "--depth", 2, "--width", 64, "--tokens", 1000, "--codes", 4, "--length", 10]
    found, _ = account(tmp_path, *given, "--vocabulary", 1600, "--lora-rank", 8)
    shape = LanguageShape("qwen3", 2, 64, 1600, 4, 10, lora_rank=8)
    assert found["trained_parameters"] == cost_of(shape).trained
    assert found["flops"] == pytest.approx(cost_of(shape).flops(1000))


def test_codes_say_what_a_row_is_made_of(tmp_path, log, ids, monkeypatch):
    """Of the account, and of what a probe trains."""
    seen = []

    def measure(whole, tokens, arguments, script, **more):
        seen.append(dict(zip(arguments[::2], arguments[1::2], strict=True)) | {"script": script})
        operations = whole.flops_per_token * 100
        sizes = (0.01, 5.0, 100.0, operations, operations / 0.01, 1e11, operations / 1e9)
        return throughput.Probe("lm:llama", 2, 64, *sizes, "here", "float32", 40)

    monkeypatch.setattr(probing, "probe", measure)
    given = ["--encoder", "lm:llama", "--depth", 2, "--width", 64, "--semantic-ids", ids]
    for words, text in (([], 512), (["--vocabulary", 417], 400)):
        found, _ = account(tmp_path, *given, *words, "--tokens", 1000)
        assert found["parameters"] == cost_of(LanguageShape("llama", 2, 64, text + 17, 3, 50)).parameters
        probed, _ = account(tmp_path, *given, *words, "--interactions", log, "--probe")
        assert probed["parameters"] == found["parameters"]
        assert (seen[-1]["script"], seen[-1]["--text_vocab_size"]) == ("train/sft.py", str(text))


def test_a_log_says_what_there_is(tmp_path, log, monkeypatch):
    """A probe gets the flags of the script, and its seconds are shown."""
    seen = []

    def measure(whole, tokens, arguments, script, **more):
        seen.append((tokens, arguments, script, more))
        operations = whole.flops_per_token * 100
        return throughput.Probe(
            *("hstu", 2, 32, 0.01, 5.0, 100.0, operations, operations / 0.01, 1e11),
            mfu=operations / 1e9,
            device="here",
            dtype="float32",
            steps=40,
        )

    monkeypatch.setattr(probing, "probe", measure)
    given = ["--encoder", "hstu", "--depth", 2, "--width", 32, "--length", 15, "--interactions", log, "--epochs", 2]
    more = ["--flag", "relative_bias=time", "--flag", "time_buckets=64", "--negatives", 8, "--probe"]
    found, shown = account(tmp_path, *given, *more, "--probes", tmp_path)
    ((tokens, arguments, script, options),) = seen
    assert (found["tokens"], script) == (tokens, "train/seqrec.py")
    assert 500 < tokens < 3000
    assert found["seconds"] == pytest.approx(5 + 2 * tokens / 100 * 0.01)
    assert "10.0 ms a step on here, float32" in " ".join(shown.split())
    said = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert said["--relative_bias"] == "time"
    assert said["--num_time_buckets"] == "64"
    assert (said["--loss"], said["--num_negatives"]) == ("sampled_softmax", "8")
    assert (said["--interactions"], said["--max_history"]) == (str(log), "15")
    assert "--num_attention_heads" not in said
    assert options["dtype"] == "float32"
    # Every flag of a model is one that the script knows.
    model = {name for name in said if name.removeprefix("--") in EncoderArguments.__dataclass_fields__}
    assert model == {"--encoder", "--hidden_size", "--num_hidden_layers", "--relative_bias", "--num_time_buckets"}


GIVEN = ["--depth", 2, "--width", 32]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--encoder", "hstu"], "Nothing says how many items and events"),
        (["--encoder", "hstu", "--tokens", 5], "Nothing says how many items and events"),
        (["--encoder", "lm:llama"], "Nothing says how many items and events"),
        (["--encoder", "hstu", "--items", 5, "--tokens", 5, "--probe"], "there is nothing to train on"),
        (["--encoder", "hstu", "--items", 5, "--interactions", "LOG"], "--items or --tokens is given beside"),
        (["--encoder", "mamba", "--items", 5, "--tokens", 5], "encoder of a model is 'mamba'"),
        (["--encoder", "lm:bloom", "--tokens", 5], "no costs of a 'bloom'"),
        (["--encoder", "lm:llama", "--tokens", 5, "--flag", "gate=true"], "is an encoder's"),
        (["--encoder", "hstu", "--items", 5, "--tokens", 5, "--flag", "colour=red"], "--flag is 'colour=red'"),
        (["--encoder", "hstu", "--items", 5, "--tokens", 5, "--flag", "gate"], "--flag is 'gate'"),
        (["--encoder", "hstu", "--items", 5, "--tokens", 5, "--flag", "gate=maybe"], "Say true or false"),
        (["--encoder", "hstu", "--items", 5, "--tokens", 5, "--flag", "qk_dim=x"], "Give a whole number"),
        (["--encoder", "hstu", "--items", 5, "--tokens", 0], "0 events for 1 epochs are no training"),
        (["--encoder", "hstu", "--items", 5, "--tokens", "inf"], "inf events for 1 epochs are no training"),
        (["--encoder", "hstu", "--items", 0, "--tokens", 5], "items of a model is 0"),
        (["--encoder", "hstu", "--items", 5, "--tokens", 5, "--codes", 4], "--codes is given, and nothing of hstu"),
        (["--encoder", "hstu", "--items", 5, "--tokens", 5, "--lora-rank", 4], "--lora-rank is given"),
        (["--encoder", "hstu", "--items", 5, "--tokens", 5, "--vocabulary", 40], "--vocabulary is given"),
        (["--encoder", "hstu", "--items", 5, "--tokens", 5, "--semantic-ids", "x"], "--semantic-ids is given"),
        (["--encoder", "lm:gpt2", "--tokens", 5, "--negatives", 4], "--negatives is given, and nothing of lm:gpt2"),
        (["--encoder", "lm:gpt2", "--tokens", 5, "--shared-negatives"], "--shared-negatives is given"),
        (["--encoder", "lm:gpt2", "--tokens", 5, "--items", 5], "--items is given, and nothing of lm:gpt2"),
        (["--encoder", "lm:gpt2", "--tokens", 5, "--semantic-ids", "IDS", "--codes", 2], "--codes is 2, and an item"),
        (["--encoder", "lm:gpt2", "--tokens", 5, "--semantic-ids", "IDS", "--vocabulary", 17], "17, and"),
        (["--encoder", "lm:llama", "--interactions", "LOG", "--probe"], "Name their folder with --semantic-ids"),
    ],
)
def test_what_cannot_be_said(log, ids, words, message):
    done = call(*[{"LOG": log, "IDS": ids}.get(word, word) for word in words], *GIVEN)
    assert isinstance(done.exception, DataError), done.output
    assert message in str(done.exception)


@pytest.mark.slow
def test_a_real_probe(tmp_path, log):
    given = ["--encoder", "hstu", *GIVEN, "--length", 10, "--batch", 16, "--interactions", log, "--probe"]
    found, _ = account(tmp_path, *given, "--probes", tmp_path / "probes")
    probe = found["probe"]
    # The epoch's windows in batches of sixteen.
    assert probe["tokens_per_step"] == pytest.approx(found["tokens"] / -(-found["tokens"] // 160), rel=0.5)
    assert probe["flops_per_step"] == pytest.approx(found["flops_per_token"] * probe["tokens_per_step"])
    assert 0 < probe["mfu"] < 1
    assert found["seconds"] > probe["startup_seconds"] > 0
    again, _ = account(tmp_path, *given, "--probes", tmp_path / "probes")
    assert again == found
