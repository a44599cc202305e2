"""Any transformers model, and other torch modules, as JAX functions.

::

    from lora_jax.torch import from_torch

    fn, params = from_torch("zai-org/GLM-4-9B-0414", dtype=jnp.bfloat16, remat=True)
    params = lj.lorafy(params, [lj.LoraRule(targets=["q_proj", "v_proj"], rank=8)])
    logits = lj.adapt(fn)(params, ids)

It needs torch, transformers and torchax: ``pip install 'lora_jax[torch]'``. `from_torch` says what
the parameters are called.
"""

from lora_jax.torch.packages import TorchModelError as TorchModelError
from lora_jax.torch.packages import importing

with importing():
    from lora_jax.torch.config import TorchConfig as TorchConfig
    from lora_jax.torch.files import TorchFolder as TorchFolder
    from lora_jax.torch.load import from_torch as from_torch
    from lora_jax.torch.model import TorchModel as TorchModel
