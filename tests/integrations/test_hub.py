"""Sharing adapters with the client of the Hugging Face Hub, which talks to a stand-in for the Hub.

The client reads its settings when it is imported, so it runs in a process of its own: `client(function, ...)` calls a
function of this file there.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM
from transformers.utils.hub import PushToHubMixin

from peft_child import ChildTuningConfig
from peft_child.card.model_card import BEGIN, END
from peft_child.integrations.hub import bringing_cards

from ..helpers import batch_of, build, chosen_model, config_for, logits, move
from ..hubserver import File, HubServer


TOKEN = "hf_test"
BASE = "tester/base"
CHILD = "tester/child"
HEAT_MAP = {"child_network.png"} if importlib.util.find_spec("matplotlib") else set()
FILES = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", *HEAT_MAP}
START = "import sys; sys.path.append(sys.argv[1]); from tests.integrations.test_hub import serve; serve()"


# In the client's process


def serve():
    """Answer calls, one line of JSON each, until there are no more."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"value": globals()[name](**arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def publish_base():
    build("llama").push_to_hub(BASE, token=TOKEN)


def trained(seed):
    """An adapter of the base model from the Hub."""
    model = chosen_model("llama", LlamaForCausalLM.from_pretrained(BASE).eval())
    torch.manual_seed(seed)
    move(model)
    return model


def outputs(model):
    return logits(model, batch_of("llama")).flatten().tolist()


def push(repo, seed=0, second=False, **options):
    """Push an adapter, and a second one if wanted; returns the outputs of the last one."""
    model = trained(seed)
    if second:
        model.add_adapter("second", config_for("llama", variant="random"))
        model.set_adapter("second")
        move(model, adapter_name="second")
    model.push_to_hub(repo, token=TOKEN, **options)
    return outputs(model)


def load(repo, **options):
    return outputs(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(BASE), repo, **options))


def load_automatically(repo):
    return outputs(AutoPeftModelForCausalLM.from_pretrained(repo))


def load_and_push(repo):
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(BASE), repo)
    model.push_to_hub(repo, token=TOKEN)


def upload(repo, folder, seed=0):
    """The other way to push: save to a folder, and upload it."""
    trained(seed).save_pretrained(folder)
    api = HfApi(token=TOKEN)
    api.create_repo(repo, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder)


def write_card(repo, text, path="README.md", revision=None):
    api = HfApi(token=TOKEN)
    api.create_repo(repo, exist_ok=True)
    api.upload_file(repo_id=repo, path_in_repo=path, path_or_fileobj=text.encode(), revision=revision)


def push_natively(repo, seed=0):
    """Push an adapter that a transformers model has without PEFT's classes around it."""
    model = LlamaForCausalLM.from_pretrained(BASE).eval()
    model.add_adapter(config_for("llama", variant="random"))
    torch.manual_seed(seed)
    move(model)
    model.push_to_hub(repo, token=TOKEN)
    return outputs(model)


def load_natively(repo):
    model = LlamaForCausalLM.from_pretrained(BASE)
    model.load_adapter(repo)
    return outputs(model)


def push_low_rank(repo, without_us):
    """Push a LoRA adapter, by the method of transformers itself if wanted."""
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(BASE), LoraConfig(target_modules=["q_proj"]))
    method = PushToHubMixin.push_to_hub.__wrapped__ if without_us else type(model).push_to_hub
    method(model, repo, token=TOKEN, tags=["mine"])


# In this process


class ClientError(Exception):
    pass


@pytest.fixture(scope="module")
def hub():
    with HubServer(token=TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("client")
    others = ("HF_", "HUGGING", "TRANSFORMERS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", START, Path(__file__).parents[2]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=folder,
            env={**environment, **hub.environment(folder / "cache")},
        ) as process,
    ):

        def call(function, **arguments):
            print(json.dumps([function.__name__, arguments]), file=process.stdin, flush=True)
            line = process.stdout.readline()
            assert line, (folder / "log").read_text()
            answer = json.loads(line)
            if "error" in answer:
                raise ClientError(answer["error"])
            return answer["value"]

        call(publish_base)
        yield call
        process.stdin.close()


@pytest.fixture(scope="module")
def published(client):
    """The outputs of the adapter that is pushed as `CHILD`."""
    return client(push, repo=CHILD)


def files_of(hub, repo, revision="main"):
    return {path: file.data for path, file in hub.repositories[repo].at(revision).files.items()}


def card_of(hub, repo):
    return files_of(hub, repo)["README.md"].decode()


def test_an_adapter_loads_from_the_hub(client, published):
    assert client(load, repo=CHILD) == published
    assert client(load_automatically, repo=CHILD) == published


def test_a_push_holds_nothing_else(hub, published):
    assert files_of(hub, CHILD).keys() == FILES


def test_a_push_of_an_unchanged_adapter_makes_no_commit(hub, client, published):
    before = len(hub.repositories[CHILD].history())
    client(push, repo=CHILD)
    client(load_and_push, repo=CHILD)
    assert len(hub.repositories[CHILD].history()) == before


def test_revisions_are_kept_apart(hub, client):
    repo = "tester/revisions"
    first = client(push, repo=repo)
    commit = hub.repositories[repo].at("main").sha
    second = client(push, repo=repo, seed=1)
    third = client(push, repo=repo, seed=2, revision="trial")
    assert first != second != third
    assert client(load, repo=repo) == second
    assert client(load, repo=repo, revision=commit) == first
    assert client(load, repo=repo, revision="trial") == third


def test_another_adapter_is_in_a_subfolder(hub, client):
    repo = "tester/several"
    expected = client(push, repo=repo, second=True)
    assert client(load, repo=repo, subfolder="second") == expected != client(load, repo=repo)
    second = {f"second/{name}" for name in FILES - {".gitattributes"}}
    assert files_of(hub, repo).keys() == FILES | second
    assert "a fixed random choice" in files_of(hub, repo)["second/README.md"].decode()


def test_a_private_adapter_needs_the_token(client):
    repo = "tester/secret"
    expected = client(push, repo=repo, private=True)
    with pytest.raises(ClientError, match=r"^ValueError: Can't find 'adapter_config.json' at 'tester/secret'$"):
        client(load, repo=repo)
    assert client(load, repo=repo, token=TOKEN) == expected
    with pytest.raises(ClientError, match=r"^ValueError: Can't find 'adapter_config.json' at 'tester/missing'$"):
        client(load, repo="tester/missing", token=TOKEN)


def test_a_push_without_the_right_token_is_refused(hub, client):
    with pytest.raises(ClientError, match="Invalid username or password"):
        client(upload_without_token, repo="tester/refused")
    assert "tester/refused" not in hub.repositories


def upload_without_token(repo):
    trained(0).push_to_hub(repo)


def test_an_uploaded_folder_brings_its_card(hub, client, tmp_path):
    repo = "tester/uploaded"
    client(upload, repo=repo, folder=str(tmp_path))
    assert files_of(hub, repo).keys() == FILES
    assert_describes(card_of(hub, repo))

    before = len(hub.repositories[repo].history())
    client(upload, repo=repo, folder=str(tmp_path))
    assert len(hub.repositories[repo].history()) == before


def test_an_authors_card_stays_in_an_uploaded_folder(hub, client, tmp_path):
    repo = "tester/documented"
    client(upload, repo=repo, folder=str(tmp_path))
    edited = edit(card_of(hub, repo))
    (tmp_path / "README.md").write_text(edited)
    client(upload, repo=repo, folder=str(tmp_path), seed=1)
    assert card_of(hub, repo) == edited
    assert len(hub.repositories[repo].history()) == 3


def test_a_push_brings_the_card(hub, published):
    assert_describes(card_of(hub, CHILD))


def test_an_authors_card_stays_at_the_next_push(hub, client):
    repo = "tester/edited"
    client(push, repo=repo)
    edited = edit(card_of(hub, repo))
    client(write_card, repo=repo, text=edited.replace("| all |", "| everything |"))
    client(push, repo=repo, seed=1)
    assert card_of(hub, repo) == edited


@pytest.mark.parametrize("base_model", [[], [f"base_model:  '{BASE}'"]], ids=["incomplete", "complete"])
def test_an_authors_card_stays_at_the_first_push(hub, client, base_model):
    repo = f"tester/announced-{len(base_model)}"
    front = ["---", "license: mit", *base_model, "library_name: peft", "tags:", "- child-tuning", "- peft-child"]
    words = "\r\n".join(["---", "# Soon ", "", "Words. "])
    client(write_card, repo=repo, text="\r\n".join([*front, words]))
    client(push, repo=repo)
    card = card_of(hub, repo)
    completed = front if base_model else [*front, f"base_model: {BASE}"]
    assert card.startswith("\r\n".join([*completed, words]) + f"\n\n{BEGIN}\n")
    assert card.endswith(END)
    assert "| all |" in card


def test_cards_of_branches_and_subfolders_are_kept_apart(hub, client):
    repo = "tester/apart"
    client(push, repo=repo, second=True)
    edited = edit(card_of(hub, repo))
    client(push, repo=repo, revision="trial")
    client(write_card, repo=repo, text=edited, revision="trial")
    second = "Words of the second.\n"
    client(write_card, repo=repo, text=second, path="second/README.md")
    client(push, repo=repo, seed=1, revision="trial")
    client(push, repo=repo, seed=1, second=True)
    assert files_of(hub, repo, "trial")["README.md"].decode() == edited
    assert_describes(card_of(hub, repo))
    assert "Words" not in card_of(hub, repo)
    assert second in files_of(hub, repo)["second/README.md"].decode()
    assert "a fixed random choice" in files_of(hub, repo)["second/README.md"].decode()


def test_a_template_from_earlier_gives_way(hub, client):
    repo = "tester/template"
    client(push_low_rank, repo=repo, without_us=True)
    client(push, repo=repo)
    assert_describes(card_of(hub, repo))
    assert "More Information Needed" not in card_of(hub, repo)


def test_a_card_that_cannot_be_read_stays_and_holds_nothing_back(hub, client):
    repo = "tester/unreadable"
    expected = client(push, repo=repo)
    for number, card in enumerate([b"---\ntags: [\n---\nWords.", b"Words \xff."]):
        hub.repositories[repo].commit("main", {**hub.repositories[repo].at("main").files, "README.md": File(card)}, "")
        assert client(push, repo=repo, seed=1 + number, tags=["mine"]) != expected
        assert files_of(hub, repo)["README.md"] == card
        assert client(load, repo=repo) != expected


def test_the_arguments_of_a_push(hub, client):
    repo = "tester/arguments"
    client(push, repo=repo, tags=["mine", "peft-child"], max_shard_size="1GB", private=True)
    assert hub.repositories[repo].private
    assert hub.repositories[repo].at("main").title == "Upload model"
    tags = ModelCard(card_of(hub, repo)).data.tags
    assert "mine" in tags
    assert tags.count("peft-child") == 1

    before = hub.repositories[repo].at("main").sha
    client(push, repo=repo, tags=["mine"])
    assert hub.repositories[repo].at("main").sha == before
    client(push, repo=repo, seed=1, commit_message="Better", commit_description="By far.")
    commit = hub.repositories[repo].at("main")
    assert (commit.title, commit.description) == ("Better", "By far.")
    assert ModelCard(card_of(hub, repo)).data.tags == tags

    assert client(push, repo=repo, seed=2, create_pr=True) == client(
        load, repo=repo, revision="refs/pr/1", token=TOKEN
    )
    client(push, repo=repo, seed=3, revision="refs/pr/1")
    assert len(hub.repositories[repo].history("refs/pr/1")) == 5
    assert hub.repositories[repo].at("main") == commit

    with pytest.raises(ClientError, match=r"TypeError: .* unexpected keyword argument 'comit_message'"):
        client(push, repo=repo, comit_message="Typo")


def test_adapters_of_transformers_own_bring_their_card(hub, client):
    repo = "tester/native"
    expected = client(push_natively, repo=repo)
    assert client(load_natively, repo=repo) == expected == client(load, repo=repo)
    assert f"# Child network of {BASE}" in card_of(hub, repo)
    edited = edit(card_of(hub, repo))
    client(write_card, repo=repo, text=edited)
    client(push_natively, repo=repo, seed=1)
    assert card_of(hub, repo) == edited

    before = hub.repositories[repo].at("main").sha
    client(push_natively, repo=repo, seed=1)
    assert hub.repositories[repo].at("main").sha == before


def test_other_peft_methods_are_pushed_as_ever(hub, client):
    for _ in range(2):
        client(push_low_rank, repo="tester/low-rank", without_us=False)
        client(push_low_rank, repo="tester/low-rank-without-us", without_us=True)
    first, second = (hub.repositories[repo] for repo in ("tester/low-rank", "tester/low-rank-without-us"))
    assert first.at("main").files == second.at("main").files
    assert [commit.title for commit in first.history()] == [commit.title for commit in second.history()]


def test_the_very_same_method_pushes_everything_else():
    def push_to_hub(self, *args, **kwargs):
        return self, args, kwargs

    ours = bringing_cards(push_to_hub)
    child = chosen_model("llama")
    low_rank = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    native = build("llama")
    native.add_adapter(LoraConfig(target_modules=["q_proj"]))
    others = [child.get_base_model(), low_rank, low_rank.get_base_model(), native, build("llama"), ChildTuningConfig()]
    for model in others:
        assert ours(model, 1, other=2) == (model, (1,), {"other": 2})


def assert_describes(card):
    assert f"# Child network of {BASE}" in card
    assert f'LlamaForCausalLM.from_pretrained("{BASE}")' in card
    assert "library_name: peft" in card
    assert f"base_model: {BASE}" in card
    assert "- peft-child\n" in card
    assert "license:" not in card
    assert ("child_network.png" in card) == bool(HEAT_MAP)


def edit(card):
    """A card with the words of its author around the section of this package."""
    front = card[: card.index("# Child network of")].replace("---\n", "---\nlicense: mit\n", 1)
    section = card[card.index(BEGIN) : card.index(END) + len(END)]
    words = f"# My child\n\nWords above, with `code`.\n\n{section}\n\n## Results\n\nWords below.\n"
    return f"{front}{words}- PEFT {peft.__version__}"
