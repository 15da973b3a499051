"""Tiny models of every architecture that transformers has for a task, and what their forward takes."""

from __future__ import annotations

import inspect
from functools import cache

import torch
from peft import TaskType
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto


TASKS = {
    "sequence_classification": TaskType.SEQ_CLS,
    "token_classification": TaskType.TOKEN_CLS,
    "question_answering": TaskType.QUESTION_ANS,
    "multiple_choice": None,
}
LENGTH = 32  # some attend to blocks of so many tokens
VOCABULARY = 120
SMALL = {
    2: (
        "num_hidden_layers num_layers n_layer n_layers num_decoder_layers encoder_layers decoder_layers depth "
        "l_layers r_layers x_layers num_self_attends_per_block first_k_dense_replace num_nextn_predict_layers "
        "num_local_experts n_routed_experts num_experts num_experts_per_tok moe_topk n_group topk_group "
        "num_landmarks num_kv_heads num_key_value_heads linear_num_key_heads num_query_groups n_mamba_heads"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads index_n_heads "
        "num_self_attention_heads num_cross_attention_heads linear_num_value_heads kv_lora_rank q_lora_rank "
        "qk_rope_head_dim qk_nope_head_dim coordinate_size mamba_d_state block_size num_latents rotary_dim "
        "linear_key_head_dim linear_value_head_dim adapter_rank num_hash hash_code_len local_transformer_stride "
        "mamba_dt_rank"
    ),
    8: (
        "head_dim d_kv d_head attention_head_dim kv_channels v_head_dim attention_head_size attention_window "
        "index_head_dim index_topk query_pre_attn_scalar shape_size segment_means_seq_len chunk_size mamba_headdim "
        "tpu_short_seq_length"
    ),
    32: (
        "hidden_size d_model n_embd dim emb_dim embedding_size input_embedding_size output_embedding_size d_latents "
        "entity_emb_size pooler_hidden_size prediction_head_size word_embed_proj_dim true_hidden_size "
        "out_hidden_size intra_bottleneck_size xpath_unit_hidden_size pronunciation_embed_dim shape_embed_dim "
        "attention_hidden_size intermediate_size d_ff d_inner n_inner dff ffn_dim encoder_ffn_dim decoder_ffn_dim "
        "hidden_dim ffn_hidden_size feed_forward_size moe_intermediate_size shared_expert_intermediate_size "
        "dim_model_base prompt_length prompt_mid_dim visual_feat_dim image_size input_size num_hash_buckets "
        "entity_vocab_size max_xpath_tag_unit_embeddings max_xpath_subs_unit_embeddings max_depth num_qa_labels"
    ),
    64: (
        "max_position_embeddings n_positions max_seq_len max_encoder_position_embeddings max_2d_position_embeddings "
        "max_decoder_position_embeddings original_max_position_embeddings"
    ),
    VOCABULARY: "vocab_size shape_vocab_size pronunciation_vocab_size",
}
SIZES = {name: size for size, names in SMALL.items() for name in names.split()}
ONE_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "attention_layers")
LEFT_OPEN = ("vocab_size", "head_dim", "num_key_value_heads", "num_experts_per_tok")  # by some that need them
HYBRID = {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3}  # two are tied
OWN = {
    "axk1": {"head_dim": 4, "n_routed_experts": 4},
    "axk2": {"head_dim": 4, "n_routed_experts": 4, "num_key_value_heads": 4},
    "bros": {"hidden_size": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v3": {"head_dim": 4},
    "esmc": {"num_key_value_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lilt": {"hidden_size": 48},
    "markuplm": {"tag_pad_id": 20, "subs_pad_id": 20},
    "nystromformer": {"segment_means_seq_len": LENGTH},
    "reformer": {"axial_pos_shape": (4, 8), "axial_pos_embds_dim": (16, 16), "attn_layers": ["local", "lsh"]},
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**HYBRID, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        **HYBRID,
        "hybrid_layer_ids": [1, 2],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 8,
    },
}


def architectures(task):
    return list(getattr(modeling_auto, f"MODEL_FOR_{task.upper()}_MAPPING_NAMES"))


def tiny_config(config_class, **own):
    """The configuration of a class with everything in it small that has a size."""
    default = config_class()
    changes = {}
    for name, value in vars(default).items():
        if name in config_class.sub_configs and value is not None:
            changes[name] = tiny_config(type(value))
        elif name in ONE_PER_LAYER and value:
            changes[name] = [value[0], next((other for other in value if other != value[0]), value[0])]
        elif (type(value) is int and value > SIZES.get(name, value)) or (value is None and name in LEFT_OPEN):
            changes[name] = SIZES[name]
        elif name.endswith(("_token_id", "_token_index", "_index")) and type(value) is int:
            changes[name] = value if value < 5 else VOCABULARY - 1 - len(changes) % 40
    if getattr(default, "pad_token_id", 0) is None:
        changes["pad_token_id"] = 0
    return config_class(**{**changes, **own})


@cache
def runnable(task, model_type):
    """A tiny model whose forward and backward pass run, and its inputs; or why there is none."""
    mapping = getattr(modeling_auto, f"MODEL_FOR_{task.upper()}_MAPPING")
    torch.manual_seed(0)
    try:
        config = tiny_config(CONFIG_MAPPING[model_type], **OWN.get(model_type, {}))
        model = mapping[type(config)](config)
        batch = inputs(task, model)
        run(model.train(), batch).sum().backward()
        model.zero_grad()
        again = run(model.eval(), batch)
        if not torch.equal(run(model, batch), again):
            raise ValueError("two runs differ")
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return model, batch


def inputs(task, model):
    shape = (2, 2, LENGTH) if task == "multiple_choice" else (2, LENGTH)
    tokens = torch.randint(5, 60, shape, generator=torch.Generator().manual_seed(0))
    eos = getattr(model.config.get_text_config(), "eos_token_id", None)
    tokens[..., 4:6] = getattr(model.config, "sep_token_id", None) or 4
    tokens[..., -1] = eos if isinstance(eos, int) else 2
    taken = inspect.signature(model.forward).parameters
    if "inputs" in taken and "input_ids" not in taken:
        return {"inputs": tokens}
    batch = {"input_ids": tokens}
    if "bbox" in taken:
        boxes = torch.tensor([1, 2, 5, 8]).expand(*shape, 4)
        batch["bbox"] = boxes / 10 if model.config.model_type == "bros" else boxes
    if "visual_feats" in taken:
        batch |= {"visual_feats": torch.ones(2, 3, model.config.visual_feat_dim), "visual_pos": torch.ones(2, 3, 4)}
    return batch


def run(model, batch):
    """All floating point results of a forward pass, in one vector; what is drawn in it is drawn alike each time."""
    torch.manual_seed(0)
    found = model(**batch, return_dict=True)
    return torch.cat(
        [value.flatten() for value in found.values() if torch.is_tensor(value) and value.is_floating_point()]
    )
