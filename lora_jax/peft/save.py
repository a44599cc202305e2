"""Writes an adapted tree as PEFT writes an adapter's folder."""

import json
import os

from lora_jax.buckets.copies import writes_to_buckets
from lora_jax.core.types import Model, Tree
from lora_jax.folders import TEMPLATE_FILE, check_free, local_path, new_folder
from lora_jax.hf.stored.raw import array_entry, write_tensors
from lora_jax.peft import config as configuration
from lora_jax.peft.contents import contents
from lora_jax.peft.errors import PeftError
from lora_jax.peft.experts import OF_MLP, TAKEN_FOR_EXPERTS
from lora_jax.peft.names import FILE
from lora_jax.peft.served import as_served


@writes_to_buckets(by_all=False)
def save(
    folder: str | os.PathLike[str],
    model: Model,
    params: Tree,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    readme: str | None = None,
    chat_template: str | None = None,
    overwrite: bool = False,
    embedding_layers: bool = True,
    for_serving: bool = False,
) -> None:
    """Writes an adapter as PEFT does: adapter_config.json and adapter_model.safetensors.

    Args:
      folder: created, its parents too; appears whole or not at all. One process alone writes it.
      model: the model of `lora_jax.models`, or the key table of another tree; see `load`.
      params: an adapted tree. Initialisers that take factors out of the base (PiSSA, OLoRA) are
        written as plain LoRA of twice the rank on the original base, and compact variants that PEFT
        does not have as plain LoRA. A kind of its own in PEFT is written as `lora_jax.peft.forms`
        says.
      base_model: the base's hub name or folder, which PEFT's ``AutoPeftModel`` reads.
      task_type: PEFT's, such as "CAUSAL_LM" or "SEQ_CLS". By default there is none, but
        "CAUSAL_LM" for an activated LoRA, which PEFT runs for this type alone.
      readme: the text of README.md, the hub's model card; None for none.
      chat_template: the template that rendered the chats it was trained on, if it has its own.
      overwrite: replace an adapter's folder. Without it, an existing folder is an error.
      embedding_layers: whether the base of an adapted table or head is written, too, as PEFT does
        by default (``save_embedding_layers``).
      for_serving: writes the same function in the layout that vLLM reads: one rank, scales in B,
        every projection of experts; see `lora_jax.peft.served`.

    Raises:
      PeftError: names the part of the adapter that PEFT cannot hold.
      FileExistsError: if the folder exists; with `overwrite`, if it is no adapter's folder.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> config = models.read_config(fields | {"n_positions": 16})
    >>> model = models.GPT2(config)
    >>> ids = jnp.array([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> from lora_jax import peft
    >>> import tempfile
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["c_attn"], rank=2)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     peft.save(f"{folder}/peft", model, tree, task_type="CAUSAL_LM")
    ...     loaded = peft.load(f"{folder}/peft", model, params)
    ...     peft.serving_problems(f"{folder}/peft")
    []
    """
    folder = local_path(folder).absolute()
    check_free(folder, overwrite, configuration.FILE, "adapter's")
    config, tensors = contents(model, params, embedding_layers)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if for_serving:
        config, tensors = as_served(config, tensors, model)
    elif model_type in TAKEN_FOR_EXPERTS and (others := set(OF_MLP.findall("\n".join(tensors)))):
        parts = sorted(name.rstrip(".") or "its layers without experts" for name in others)
        names = ", ".join(parts)
        raise PeftError(
            f"PEFT takes gate_proj, up_proj and down_proj of a {model_type} model for its experts, "
            f"and cannot hold an adapter of {names}: leave it out (exclude=['shared_expert'], "
            "['shared_experts', 'dense/mlp']), merge the adapter, or write it for_serving"
        )
    if task_type is None and config.get(configuration.INVOCATION):
        task_type = "CAUSAL_LM"
    config |= {"base_model_name_or_path": base_model, "task_type": task_type}
    with new_folder(folder) as partial:
        write_tensors(partial / FILE, {name: array_entry(array) for name, array in tensors.items()})
        text = json.dumps(dict(sorted(config.items())), indent=2)
        (partial / configuration.FILE).write_text(text + "\n", encoding="utf-8")
        for file, content in (("README.md", readme), (TEMPLATE_FILE, chat_template)):
            if content is not None:
                (partial / file).write_text(content, encoding="utf-8")
