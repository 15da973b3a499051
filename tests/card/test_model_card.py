import pytest
from huggingface_hub import ModelCard, ModelCardData

from peft_child import ChildTuningConfig
from peft_child.card.model_card import BEGIN, CARD_NAME, END, HEAT_MAP_NAME, TAGS, complete_card
from peft_child.tensors.delta import ChildSize

from ..helpers import chosen_model, config_for, move


SIZES = {
    "model.layers.0.self_attn.q_proj.weight": ChildSize(100, 30, 50),
    "model.layers.0.self_attn.q_proj.bias": ChildSize(10, 1, 50),
    "model.layers.1.self_attn.q_proj.weight": ChildSize(100, 20, 50),
    "model.layers.1.mlp.up_proj.weight": ChildSize(4000, 1200, 50),
    "model.embed_tokens.weight": ChildSize(500, 500, 50),
}


SETTINGS = {
    "peft_type": "PEFT_CHILD",
    "variant": "task_driven",
    "density": 0.2,
    "fisher": "per_example",
    "fisher_examples": 1024,
    "seed": 7,
    "delta_dtype": "float32",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "someone/model",
    "revision": "v1.5",
    "modules_to_save": ["lm_head"],
    "child_sizes": SIZES,
}


WORDS = "\n# Mine\n\nText | with `code`, <!-- comments --> and   spaces.  \n"


def completed(folder, card=None, **changes):
    """The card of a folder after a save; `card` is what is there before."""
    if card is not None:
        (folder / CARD_NAME).write_bytes(card.encode())
    complete_card(folder, {**SETTINGS, **changes})
    return (folder / CARD_NAME).read_bytes().decode()


def section_of(card):
    return card[card.index(BEGIN) : card.index(END) + len(END)]


# What the card says


def test_a_new_card_tells_what_the_adapter_is(tmp_path):
    card = completed(tmp_path)
    for line in [
        "base_model: someone/model",
        "library_name: peft",
        "- child-tuning",
        "- peft-child",
        "# Child network of someone/model",
        "pip install peft-child",
        "import peft_child  # registers the method with PEFT",
        "from transformers import AutoModelForCausalLM",
        'base = AutoModelForCausalLM.from_pretrained("someone/model", revision="v1.5")',
        "- **Base model:** `someone/model`",
        "- **Revision:** `v1.5`",
        "- **Variant:** `task_driven`, the entries with the largest Fisher information on the task (Child-Tuning_D)",
        "- **Density:** 0.2 of all targeted entries",
        "- **Fisher information:** `per_example`, estimated on 1,024 examples",
        "- **Stored in:** `float32`",
        "- **Trained and saved whole:** `lm_head`",
        "| `self_attn.q_proj` | 3 | 51 | 24.3 % |",
        "| `mlp.up_proj` | 1 | 1,200 | 30 % |",
        "| `model.embed_tokens` | 1 | 500 | 100 % |",
        "| all | 5 | 1,751 | 37.2 % |",
    ]:
        assert line in card.splitlines()
    assert "1,751 in 5 tensors, 37.2 % of their 4,710 entries" in card
    assert "Seed" not in card
    assert "license" not in ModelCard(card).data.to_dict()
    assert "language" not in ModelCard(card).data.to_dict()


def test_the_code_that_loads_it_is_python(tmp_path):
    code = completed(tmp_path, base_model_name_or_path='x"\n`y').partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (None, ""),
        (["LABEL_0", "LABEL_1"], ", num_labels=2"),
        (["LABEL_0"], ", num_labels=1"),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ", num_labels=3"),
        (["no", 'a "yes"'], ', id2label={0: "no", 1: "a \\"yes\\""}'),
    ],
)
def test_the_code_loads_a_head_for_as_many_classes(tmp_path, labels, shown):
    card = completed(tmp_path, task_type="SEQ_CLS", labels=labels, revision=None)
    assert f'base = AutoModelForSequenceClassification.from_pretrained("someone/model"{shown})\n' in card


def test_other_settings_tell_other_things(tmp_path):
    card = completed(tmp_path, variant="random", task_type=None)
    assert "- **Seed:** 7\n" in card
    assert "Fisher" not in card.partition("### Settings")[2]
    assert "base = ...  # the base model\n" in card

    library = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    card = completed(tmp_path, variant="extracted", task_type=None, auto_mapping=library)
    assert "Density" not in card
    assert 'base = LlamaForCausalLM.from_pretrained("someone/model", revision="v1.5")\n' in card


def test_folders_are_called_by_their_own_name_alone(tmp_path):
    card = completed(tmp_path, base_model_name_or_path=str(tmp_path / "my-base"), revision=None)
    assert 'base = AutoModelForCausalLM.from_pretrained("my-base")\n' in card
    assert "- **Base model:** `my-base`\n" in card
    assert str(tmp_path) not in card


def test_missing_settings_are_left_out(tmp_path):
    complete_card(tmp_path, {"child_sizes": SIZES})
    card = (tmp_path / CARD_NAME).read_text()
    assert "None" not in card
    assert "# Child network\n" in card
    assert "base_model" not in card
    assert "- **Chosen entries:**" in card


def test_the_heat_map_is_shown_where_matplotlib_is_installed(tmp_path):
    pytest.importorskip("matplotlib")
    assert f"]({HEAT_MAP_NAME})\n" in completed(tmp_path)
    assert (tmp_path / HEAT_MAP_NAME).exists()


@pytest.mark.usefixtures("no_matplotlib")
def test_there_is_a_card_without_matplotlib(tmp_path):
    assert HEAT_MAP_NAME not in completed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CARD_NAME]


# What stays


@pytest.mark.parametrize("card", [None, "", WORDS, f"---\nlicense: mit\n---\n{WORDS}"])
def test_completing_twice_gives_the_same_bytes(tmp_path, card):
    assert completed(tmp_path, card) == completed(tmp_path)
    other = completed(tmp_path, density=0.5)
    assert section_of(other) != section_of(completed(tmp_path))


@pytest.mark.parametrize("end", ["", "\n", "\n\n", " \n"])
def test_what_the_author_wrote_stays(tmp_path, end):
    front = "---\nlicense: mit\ntags:\n- mine\n---\n"
    card = completed(tmp_path, front + WORDS + end)
    assert card.partition("\n---\n")[2].startswith(WORDS + end)
    assert ModelCard(card).data.license == "mit"
    assert ModelCard(card).data.tags == ["mine", "child-tuning", "peft-child"]

    moved = f"{front}above\r\n{section_of(card)}{WORDS}{end}"
    body = completed(tmp_path, moved, density=0.5).partition("\n---\n")[2]
    assert body.startswith(f"above\r\n{BEGIN}")
    assert body.endswith(f"{END}{WORDS}{end}")
    assert "0.5 of all targeted entries" in body


def test_a_complete_front_matter_stays_as_it_is_written(tmp_path):
    front = (
        "---\n# by hand\nlicense:   mit\nlibrary_name: peft\n"
        "tags: [ peft-child,  child-tuning ]\nbase_model: 'someone/model'\n---\n"
    )
    assert completed(tmp_path, front + WORDS).startswith(front + WORDS)


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "front",
    [
        ["license:   mit", "tags: [mine]  # few"],
        ["{license: mit, tags: [mine]}"],
        ["tags: [mine,", "# why", "]", "license: mit"],
        ["'tags': [mine]", "license: mit", "library_name:  x"],
    ],
)
def test_a_front_matter_that_lacks_something_is_completed(tmp_path, front, line_break):
    body = WORDS.replace("\n", line_break)
    card = completed(tmp_path, line_break.join(["---", *front, "---", body]))
    data = ModelCard(card).data
    assert (data.license, data.tags, data.base_model) == ("mit", ["mine", *TAGS], "someone/model")
    assert data.library_name == "peft"
    assert card.partition(f"{line_break}---{line_break}")[2].startswith(body)


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (f"a {BEGIN} b", [f"a {BEGIN} b"]),
        (f"a {END} b", [f"a {END} b"]),
        (f"a {END} b {BEGIN} c", [f"a {END} b {BEGIN} c"]),
        (f"a {BEGIN} b {BEGIN} obsolete {END} c {END} d", [f"a {BEGIN} b {BEGIN}", f"{END} c {END} d"]),
    ],
)
def test_damaged_markers_cost_nothing(tmp_path, body, kept):
    card = completed(tmp_path, f"---\nlicense: mit\n---\n{body}")
    assert all(text in card for text in kept)
    assert "obsolete" not in card
    assert completed(tmp_path) == card


def test_a_template_that_nobody_filled_in_gives_way(tmp_path):
    blank = ModelCard.from_template(ModelCardData(library_name="peft"))
    blank.text += "\n### Framework versions\n\n- PEFT 0.21.2"
    card = completed(tmp_path, str(blank))
    assert "More Information Needed" not in card
    assert card.endswith("\n\n### Framework versions\n\n- PEFT 0.21.2")

    description = (
        "This is the model card of a model that has been pushed. This model card has been automatically generated."
    )
    blank = ModelCard.from_template(ModelCardData(), model_description=description)
    assert "More Information Needed" not in completed(tmp_path, str(blank))

    filled = ModelCard.from_template(ModelCardData(), developers="me")
    assert filled.text in completed(tmp_path, str(filled))


def test_a_base_model_in_a_folder_is_not_named_in_the_front_matter(tmp_path):
    for base in (str(tmp_path), "./model", ""):
        card = f"---\nbase_model: '{base}'\ntags:\n- 'base_model:adapter:{base}'\n- mine\n---\n{WORDS}"
        data = ModelCard(completed(tmp_path, card, base_model_name_or_path=base)).data
        assert data.base_model is None
        assert data.tags == ["mine", "child-tuning", "peft-child"]


@pytest.mark.parametrize("front", ["- a list", "tags: [", "1: 2"])
def test_a_front_matter_that_cannot_be_read_is_refused(tmp_path, front):
    card = f"---\n{front}\n---\n{WORDS}"
    with pytest.raises(ValueError, match=r"The front matter of '.*README.md' must be a model card's metadata: "):
        completed(tmp_path, card)
    assert (tmp_path / CARD_NAME).read_bytes() == card.encode()


def test_strange_names_stay_inside_the_section(tmp_path):
    strange = f"a|b`c\n{END}```\n## d"
    sizes = {f"{strange}.weight": [10, 1, 5]}
    changes = {"base_model_name_or_path": strange, "revision": strange, "child_sizes": sizes}
    card = completed(tmp_path, WORDS, **changes)
    assert card.count(END) == 1
    assert card == completed(tmp_path, **changes)
    assert "| `a\\|b'c" in card


# With PEFT


@pytest.mark.smoke
def test_saving_again_changes_no_file(tmp_path):
    model = chosen_model("bert")
    move(model)
    model.save_pretrained(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "More Information Needed" not in first[CARD_NAME].decode()
    model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_saving_keeps_the_authors_card(tmp_path):
    model = chosen_model("llama")
    card = tmp_path / CARD_NAME
    card.write_text(f"---\nlicense: mit\n---\n{WORDS}")
    model.save_pretrained(tmp_path)
    first = card.read_text()
    assert first.partition("\n---\n")[2].startswith(WORDS.rstrip("\n"))
    assert "license: mit" in first
    move(model)
    model.save_pretrained(tmp_path)
    assert card.read_text() == first


def test_every_adapter_has_a_card_of_its_own(tmp_path):
    model = chosen_model("llama")
    model.add_adapter("second", config_for("llama", variant="random", density=0.1))
    model.save_pretrained(tmp_path)
    assert "0.3 of all targeted entries" in (tmp_path / CARD_NAME).read_text()
    assert "0.1 of all targeted entries" in (tmp_path / "second" / CARD_NAME).read_text()


def test_settings_alone_have_no_card(tmp_path):
    ChildTuningConfig().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


# Places and the heat map


def test_a_child_network_of_channels_says_so(tmp_path):
    assert "Granularity" not in completed(tmp_path)
    assert "- **Granularity:** whole input channels" in completed(tmp_path, granularity="input_channel")
