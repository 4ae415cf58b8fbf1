"""Uploads to a stand-in for the hub, by the real calls of huggingface_hub over HTTP."""

from __future__ import annotations

import shlex
import shutil

import pytest
import torch
from huggingface_hub import constants

from lowrank_pl import HubRepo, load_compressed
from lowrank_pl.cli.export import export
from lowrank_pl.export.export import save_compressed
from lowrank_pl.export.hub import UploadError, upload
from lowrank_pl.models.hf_layers import LowRankLinear
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from tests.helpers.hub_server import logged_in

# Of huggingface_hub's own uploads.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch):
    with logged_in(monkeypatch) as server:
        yield server


@pytest.fixture
def model():
    made = tiny_model("llama")
    made.model.layers[0].mlp.up_proj = LowRankLinear(32, 96, 8, bias=False)
    return made


def save(model, folder, **options):
    return save_compressed(model, folder, tokenizer=byte_tokenizer(), card="# A card\n", verify=False, **options)


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_arrives_is_the_folder_byte_for_byte(hub, model, tmp_path):
    report = save(model, tmp_path / "small", push_to_hub="me/small")
    arrived = hub.branches["me/small", "main"]
    assert arrived == {".gitattributes": b"", **files_in(tmp_path / "small")}
    assert {"model.safetensors", "config.json", "hf_format.py", "lowrank.sha256", "README.md"} <= arrived.keys()
    assert report.url.startswith(f"{hub.url}/me/small/commit/")
    assert "POST /me/small.git/info/lfs/objects/batch" in hub.asked
    assert any(one.startswith("PUT /blobs/") for one in hub.asked), "weights go through LFS"


def test_the_uploaded_model_loads(hub, model, tmp_path):
    save(model, tmp_path / "small", push_to_hub="me/small")
    again = tmp_path / "again"
    again.mkdir()
    for name, content in hub.branches["me/small", "main"].items():
        (again / name).write_bytes(content)
    loaded = load_compressed(again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_repository_is_private_and_a_branch_made_if_asked_for(hub, model, tmp_path):
    save(model, tmp_path / "small", push_to_hub=HubRepo("me/small", private=True, revision="v1"))
    assert hub.private == {"me/small": True}
    assert list(hub.branches["me/small", "main"]) == [".gitattributes"]
    assert "model.safetensors" in hub.branches["me/small", "v1"]
    upload(tmp_path / "small", HubRepo("me/small", revision="v1"))


def test_old_weights_go_and_files_of_others_stay(hub, model, tmp_path):
    save(model, tmp_path / "small", push_to_hub="me/small")
    files = hub.branches["me/small", "main"]
    files |= {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}"}
    others = ["logo.png", "adapter/adapter_model.safetensors", "other/model.safetensors"]
    files |= dict.fromkeys(others, b"mine")
    save(model, tmp_path / "small", push_to_hub="me/small")
    assert files == {".gitattributes": b"", **dict.fromkeys(others, b"mine"), **files_in(tmp_path / "small")}


def test_components_are_uploaded_and_those_of_an_earlier_export_go(hub, model, tmp_path):
    save(model, tmp_path / "small")
    (tmp_path / "small" / "nested").mkdir()
    (tmp_path / "small" / "nested" / "b.safetensors").write_bytes(b"components")
    upload(tmp_path / "small", HubRepo("me/small"))
    files = hub.branches["me/small", "main"]
    assert files["nested/b.safetensors"] == b"components"
    shutil.rmtree(tmp_path / "small" / "nested")
    upload(tmp_path / "small", HubRepo("me/small"))
    assert not [name for name in files if name.startswith("nested")]


def command_in(error):
    return str(error.value).partition("This uploads it: ")[2]


@pytest.mark.parametrize(
    ("status", "where", "said"),
    [
        (401, "create", "the hub does not accept the token; run `hf auth login` again"),
        (403, "create", "the token may not write there"),
        (403, "commit", "the token may not write there"),
        (500, "validate-yaml", "500"),
    ],
)
def test_a_refused_upload_leaves_a_finished_folder_and_says_how_to_upload_it(hub, model, tmp_path, status, where, said):
    hub.refuse = (status, where)
    with pytest.raises(UploadError, match="is finished and checked, but was not uploaded to me/small") as error:
        save(model, tmp_path / "my model", push_to_hub="me/small")
    assert said in str(error.value)
    words = ["hf", "upload", "me/small", str(tmp_path / "my model"), "."]
    # Old weights go, as in the upload that failed.
    stale = ["model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"]
    deleted = [word for name in [*stale, "nested/*.safetensors"] for word in ("--delete", name)]
    assert shlex.split(command_in(error)) == words + deleted
    assert load_compressed(tmp_path / "my model").num_parameters()


def test_without_a_login_the_sentence_says_how_to_log_in(hub, model, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UploadError, match="nobody is logged in; run `hf auth login`, or set HF_TOKEN"):
        save(model, tmp_path / "small", push_to_hub="me/small")
    assert "nobody is logged in to the hub: run `hf auth login` before the upload" in caplog.text
    assert load_compressed(tmp_path / "small").num_parameters()


def test_offline_mode_is_told_before_and_after_the_export(hub, model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UploadError, match="HF_HUB_OFFLINE is set; unset it") as error:
        save(model, tmp_path / "small", push_to_hub=HubRepo("me/small", private=True, revision="v1"))
    assert "HF_HUB_OFFLINE is set, so the upload to me/small is going to fail" in caplog.text
    assert " . --private --revision v1 --delete " in command_in(error)
    assert hub.asked == []
    assert load_compressed(tmp_path / "small").num_parameters()


def test_a_hub_that_can_not_be_reached_is_named(hub, model, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UploadError, match=r"http://127\.0\.0\.1:9 can't be reached or broke off"):
        save(model, tmp_path / "small", push_to_hub="me/small")


@pytest.mark.parametrize("name", ["a/b/c", "me/small model", "", "me/a..b", "-x", "small.git"])
def test_names_that_are_no_repository_are_refused_before_any_work(name, model, tmp_path):
    with pytest.raises(ValueError, match=r"can't be a repository of the hub: .* Expected user/model"):
        save(model, tmp_path / "small", push_to_hub=name)
    assert not (tmp_path / "small").exists()


def test_names_are_refused_before_the_command_reads_its_plan(tmp_path):
    with pytest.raises(ValueError, match="can't be a repository of the hub"):
        export(tmp_path / "none.json", push_to_hub="a/b/c")
    with pytest.raises(ValueError, match="name the repository with --push_to_hub"):
        export(tmp_path / "none.json", private=True)
    with pytest.raises(ValueError, match="2 sizes can't go to one repository"):
        export(tmp_path / "none.json", push_to_hub="me/small", keep=[0.5, 0.4])
