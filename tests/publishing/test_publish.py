"""Publishing to a Hub on localhost, what may go wrong on the way, and loading it back in another process."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import random_audio, random_image
from hub_server import Blob, HubServer, go_online, running_hub
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

from vipolyqwen.doctor import diagnose
from vipolyqwen.fingerprint_vipolyqwen import FILE_NAME, fingerprint, load_fingerprint
from vipolyqwen.publish_vipolyqwen import build_repository, main
from vipolyqwen.publishing.checks import PUBLISHED, check_files, check_that_it_loads, refuse_checkpoint
from vipolyqwen.publishing.hub import upload
from vipolyqwen.publishing.repository import PublishError, save_repository

REPO = "someone/tiny-viPolyQwen.v1"  # a name as repositories have, no Python name
TRAINING_STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")

# Runs in the other process, which knows the Hub's address and nothing else.
READER = """
import json, re, sys

repo, commit, output = sys.argv[1:]
sys.modules["vipolyqwen"] = None  # an import of the package fails, as where it is not installed

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

torch.set_num_threads(1)
sound = {"array": np.load("sound.npy"), "sampling_rate": 16000}
rows = [{"text": "Trên biển ghi gì? <ocr>"}, {"image": Image.open("picture.png")}, {"audio": sound}]
rows += [{**rows[1], **rows[0]}, {**rows[1], **rows[0], **rows[2]}]  # the image first, as the processor has it


@torch.no_grad()
def embed(revision):
    model = AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repo, revision=revision, trust_remote_code=True)
    batch = processor(
        text=[row.get("text", "") for row in rows],
        images=[[row["image"]] if "image" in row else None for row in rows],
        audio=[row.get("audio") for row in rows],
        return_tensors="pt",
    )
    return model(**batch).embeddings.numpy()


vectors = {"main": embed(None), "v1": embed("v1"), "commit": embed(commit)}
encoder = SentenceTransformer(repo, revision="v1", trust_remote_code=True, device="cpu")
vectors["SentenceTransformer"] = encoder.encode([row["text"] if list(row) == ["text"] else row for row in rows])
np.savez(output, **vectors)

card = open(hf_hub_download(repo, "README.md", revision="v1"), encoding="utf-8").read()
blocks = re.findall(r"```python\\n(.*?)```", card, flags=re.DOTALL)
assert len(blocks) == 3
for number, block in enumerate(blocks):
    code = compile(block, f"example {number}", "exec")
    if "faiss" not in block:
        exec(code, names := {})
        assert names.get("embeddings", names.get("documents")).shape[1] == 1024
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub() as server:
        go_online(monkeypatch, server)
        yield server


@pytest.fixture(scope="module")
def checkpoint(tiny: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as training leaves it."""
    folder = tmp_path_factory.mktemp("run") / "output"
    save_repository(*tiny, folder)
    for name in TRAINING_STATE:
        torch.save({"step": 2}, folder / name)
    (folder / "checkpoint-2").mkdir()
    torch.save({"step": 2}, folder / "checkpoint-2" / "optimizer.pt")
    state = {"global_step": 2, "epoch": 1.0, "best_model_checkpoint": str(folder / "checkpoint-2"), "log_history": []}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture(scope="module")
def staged(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What would be published of it, in several shards; tests must not change it."""
    folder = tmp_path_factory.mktemp("staged") / "repository"
    build_repository(checkpoint, folder, REPO, max_shard_size="400KB")
    check_files(folder)
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (to / path.name).write_bytes(path.read_bytes())
    return to


def send(folder: Path, hub: HubServer, token: str = "hf_owner", **options: Any) -> Any:
    return upload(folder, REPO, PUBLISHED, api=HfApi(hub.url, token), **options)


@pytest.fixture(scope="module")
def read_back(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[HubServer, str, dict, dict]:
    """Publishes as a user does, changes the code on main, and reads both revisions in another process."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with running_hub() as server, pytest.MonkeyPatch.context() as patch:
        go_online(patch, server)
        main([str(checkpoint), "--repo_id", REPO, "--tag", "v1", "--max_shard_size", "400KB"])
        repo = server.repos[REPO]
        commit = repo.tags["v1"]
        files = dict(repo.commits[commit])
        code = files["modeling_vipolyqwen.py"].content.replace(
            b"return ViPolyQwenOutput(embeddings=embeddings", b"return ViPolyQwenOutput(embeddings=-embeddings"
        )
        repo.commit({**files, "modeling_vipolyqwen.py": Blob(code, is_lfs=False)})
        rows = write_inputs(elsewhere)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "PYTEST"))}
        settings = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(elsewhere / "home")}
        done = subprocess.run(
            [sys.executable, "-I", "-c", READER, REPO, commit, "vectors.npz"],
            cwd=elsewhere,
            env={**kept, **settings, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return server, commit, rows, dict(np.load(elsewhere / "vectors.npz"))


def write_inputs(folder: Path) -> dict[str, Any]:
    """A picture and a sound for the reader and for the card's examples; returns them as the processor takes them."""
    rng = np.random.default_rng(0)
    image, sound = random_image(rng), random_audio(rng)
    image.save(folder / "picture.png")
    np.save(folder / "sound.npy", sound["array"])
    soundfile.write(folder / "voice.wav", sound["array"], sound["sampling_rate"])
    text = "Trên biển ghi gì? <ocr>"
    return {
        "text": [text, "", "", text, text],
        "images": [None, [image], None, [image], [image]],
        "audio": [None, None, sound, None, sound],
    }


@pytest.mark.parametrize("way", ["v1", "commit", "SentenceTransformer"])
@torch.no_grad()
def test_the_pinned_revision_gives_the_vectors_from_before_publishing(way: str, tiny: tuple, read_back: tuple) -> None:
    _, _, rows, vectors = read_back
    model, processor = tiny
    expected = model(**processor(**rows, return_tensors="pt")).embeddings.numpy()
    assert vectors[way].shape == (5, 1024)
    assert np.abs(vectors[way] - expected).max() <= 1e-6


def test_a_later_commit_with_other_code_is_what_main_loads(read_back: tuple) -> None:
    vectors = read_back[3]
    assert np.abs(vectors["main"] + vectors["v1"]).max() <= 1e-6


def test_publishing_is_one_commit_and_a_tag_of_it(read_back: tuple, staged: Path) -> None:
    server, commit, _, _ = read_back
    assert len(server.paths("POST", "/commit/")) == 1
    assert server.repos[REPO].tags == {"v1": commit}
    names = {path.name for path in staged.iterdir()}
    assert set(server.repos[REPO].commits[commit]) == names | {".gitattributes"}
    assert sum(name.startswith("model-") for name in names) > 2
    assert server.paths("POST", "validate-yaml")


def test_training_state_stays_behind(staged: Path, checkpoint: Path) -> None:
    names = {path.name for path in staged.iterdir()}
    assert not names & {*TRAINING_STATE, "trainer_state.json", "checkpoint-2"}
    for path in staged.iterdir():
        assert str(checkpoint).encode() not in path.read_bytes(), path.name


def test_an_interrupted_upload_goes_on_without_sending_again_what_had_arrived(staged: Path, hub: HubServer) -> None:
    hub.uploads_before_failure = 2
    with pytest.raises(PublishError, match=r"connection to http://127.* broke.*Run the same command again"):
        send(staged, hub)
    arrived, head = set(hub.large_files), hub.repos[REPO].branches["main"]
    assert len(arrived) == 2
    assert len(hub.repos[REPO].commits) == 1 and not hub.repos[REPO].tags

    hub.uploads_before_failure = None
    hub.requests.clear()
    done = send(staged, hub)
    sent = {path.removeprefix("/upload/") for path in hub.paths("PUT")}
    assert sent and not sent & arrived
    assert len(sent) == len(hub.paths("PUT"))
    assert sent | arrived == {Blob(path.read_bytes(), True).sha256 for path in staged.glob("*.safetensors")}
    assert hub.repos[REPO].tags == {"v1": done.commit} and done.commit != head


def test_a_commit_whose_answer_was_lost_is_not_made_twice(staged: Path, hub: HubServer) -> None:
    hub.lose_commit_response = True
    with pytest.raises(PublishError, match="broke"):
        send(staged, hub)
    made = hub.repos[REPO].branches["main"]
    assert len(hub.repos[REPO].commits) == 2 and not hub.repos[REPO].tags
    assert send(staged, hub) == (REPO, made, "v1")
    assert len(hub.repos[REPO].commits) == 2


def test_publishing_the_same_again_changes_nothing(staged: Path, hub: HubServer) -> None:
    first = send(staged, hub)
    hub.requests.clear()
    assert send(staged, hub) == send(staged, hub, tag="v1") == first
    assert not hub.paths("POST", "/commit/") and not hub.paths("POST", "/tag/") and not hub.paths("PUT")


def test_a_push_of_somebody_else_meanwhile_is_not_overwritten(staged: Path, hub: HubServer) -> None:
    def push() -> None:
        repo = hub.repos[REPO]
        repo.commit({**repo.commits[repo.branches["main"]], "config.json": Blob(b"{}", is_lfs=False)})

    hub.before_commit = push
    with pytest.raises(PublishError, match=rf"Somebody else pushed to {REPO}.*run the same command again"):
        send(staged, hub)
    repo = hub.repos[REPO]
    assert repo.commits[repo.branches["main"]]["config.json"].content == b"{}" and not repo.tags
    done = send(staged, hub)  # after a look at it
    assert repo.commits[done.commit]["config.json"].content == (staged / "config.json").read_bytes()


@pytest.mark.parametrize(("token", "advice"), [("hf_wrong", "hf auth login"), ("hf_reader", "may not write to")])
def test_a_token_that_will_not_do_is_said_before_anything_is_sent(
    token: str, advice: str, staged: Path, hub: HubServer
) -> None:
    HfApi(hub.url, "hf_owner").create_repo(REPO)
    with pytest.raises(PublishError, match=advice):
        send(staged, hub, token)
    assert not hub.large_files and len(hub.repos[REPO].commits) == 1


def test_without_a_token_or_a_network_it_says_so(
    staged: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PublishError, match="Log in with `hf auth login`, or set HF_TOKEN"):
        upload(staged, REPO, PUBLISHED, api=HfApi(hub.url))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE must be unset"):
        send(staged, hub)
    assert not hub.repos


def test_a_hub_that_is_not_there_is_named(staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_hub() as server:
        go_online(monkeypatch, server)
    with pytest.raises(PublishError, match=rf"The connection to {server.url} broke"):
        send(staged, server)


def test_a_tag_never_moves(staged: Path, hub: HubServer, tmp_path: Path) -> None:
    first = send(staged, hub, tag="v1")
    other = copy_of(staged, tmp_path / "other")
    (other / "requirements.txt").write_text("torch\n")
    with pytest.raises(PublishError, match=rf"The tag 'v1' .* stands for other files \(commit {first.commit}"):
        send(other, hub, tag="v1")
    assert hub.repos[REPO].branches["main"] == first.commit
    second = send(other, hub)
    assert hub.repos[REPO].tags == {"v1": first.commit, "v2": second.commit}


def test_shards_of_an_earlier_publication_go_and_other_people_s_files_stay(
    checkpoint: Path, staged: Path, hub: HubServer, tmp_path: Path
) -> None:
    first = send(staged, hub)
    repo = hub.repos[REPO]
    repo.commit({**repo.commits[first.commit], "picture.png": Blob(b"png", is_lfs=True)})
    build_repository(checkpoint, tmp_path / "whole", REPO)
    second = send(tmp_path / "whole", hub)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert "model.safetensors" in names
    assert set(repo.commits[second.commit]) == names | {".gitattributes", "picture.png"}


def test_what_is_to_be_private_is_not_pushed_to_a_public_repository(staged: Path, hub: HubServer) -> None:
    send(staged, hub, private=True)
    assert hub.repos[REPO].private
    hub.repos[REPO].private = False
    with pytest.raises(PublishError, match="already and public"):
        send(staged, hub, private=True, tag="v2")


def test_a_name_without_an_owner_is_refused(staged: Path, hub: HubServer) -> None:
    with pytest.raises(PublishError, match="'tiny' .*ORG/NAME"):
        upload(staged, "tiny", PUBLISHED, api=HfApi(hub.url, "hf_owner"))
    assert not hub.requests


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_a_pickle_is_refused(name: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path / "copy")
    torch.save({}, folder / name)
    with pytest.raises(PublishError, match=rf"pickles \({name}\).*safetensors"):
        refuse_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json", "model.safetensors"])
def test_a_checkpoint_without_one_of_its_files_is_refused(name: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(PublishError, match=f"lacks {re.escape(name)}"):
        build_repository(folder, tmp_path / "out", REPO)


def test_a_missing_shard_is_refused(staged: Path, tmp_path: Path) -> None:
    folder = copy_of(staged, tmp_path / "copy")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    for check in (refuse_checkpoint, check_files):
        with pytest.raises(PublishError, match=f"lacks {shard.name}"):
            check(folder)


def test_a_missing_an_extra_and_a_misshapen_tensor_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors["adapter.weight"] = tensors.pop("pooling.query")
    tensors["projection.norm.bias"] = tensors["projection.norm.bias"][:3].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PublishError) as refusal:
        build_repository(folder, tmp_path / "out", REPO)
    for part in ("missing keys: pooling.query", "unexpected keys: adapter.weight", "projection.norm.bias"):
        assert part in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["/home/me/data/pairs", "~/models/base", "C:\\models\\base", "file:///srv/x"])
def test_a_path_of_this_machine_inside_is_refused(path: str, staged: Path, tmp_path: Path) -> None:
    folder = copy_of(staged, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["audio_config"]["_name_or_path"] = path
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PublishError, match=r"config\.json: audio_config: _name_or_path is '"):
        check_files(folder)


def test_where_a_backbone_was_loaded_from_is_left_out(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["audio_config"]["_name_or_path"] = "/home/me/models/hubert"
    (folder / "config.json").write_text(json.dumps(config))
    build_repository(folder, tmp_path / "out", REPO)
    check_files(tmp_path / "out")


def test_a_file_that_is_no_part_of_a_model_is_refused(staged: Path, tmp_path: Path) -> None:
    folder = copy_of(staged, tmp_path / "copy")
    (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(PublishError, match=r"optimizer\.pt: not part of a published model"):
        check_files(folder)


def edit_code(folder: Path, name: str, old: str, new: str) -> None:
    code = (folder / name).read_text(encoding="utf-8")
    assert code.count(old) == 1
    (folder / name).write_text(code.replace(old, new), encoding="utf-8")


def test_code_that_only_works_where_it_was_written_is_refused(staged: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(staged, tmp_path / "copy")
    edit_code(folder, "modeling_vipolyqwen.py", "from .configuration", "from vipolyqwen.configuration")
    with pytest.raises(PublishError, match="(?s)a fresh process cannot use.*vipolyqwen"):
        check_that_it_loads(folder, checkpoint, load_fingerprint(staged / FILE_NAME))


def test_vectors_that_differ_from_the_publishing_process_or_from_the_checkpoint_are_refused(
    tiny: tuple, checkpoint: Path, staged: Path, tmp_path: Path
) -> None:
    expected = fingerprint(*tiny)
    expected.vectors["audio: tones"] = expected.vectors["text: vi"]
    folder = copy_of(checkpoint, tmp_path / "copy")
    output = "return ViPolyQwenOutput(embeddings="
    edit_code(folder, "modeling_vipolyqwen.py", f"{output}embeddings", f"{output}-embeddings")
    with pytest.raises(PublishError) as refusal:
        check_that_it_loads(staged, folder, expected)
    assert "Broken: audio, sentence-transformers. Likely cause: [checkpoint]" in str(refusal.value)
    assert "text: cosine -1.0000000" in str(refusal.value)


def test_the_doctor_finds_nothing_wrong_with_what_is_published(staged: Path) -> None:
    assert not [finding for finding in diagnose(staged) if finding.level != "ok"]


def test_an_existing_folder_is_not_written_into(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match="Not published: .*out exists; remove it"):
        main([str(checkpoint), "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").iterdir())
