"""The facts that all plans of a command share: the model, the machine, the mesh and the batch."""

from typing import Any

from train.plan.job import PlanJob
from train.plan.options import DEFAULT_UTILISATION, PlanConfig


def describe_job(config: PlanConfig, job: PlanJob) -> dict[str, Any]:
    """Describes the shared facts of all plans, for JSON: model, machine, mesh, and batch."""
    machine = job.machine
    mesh = job.layout.mesh.shape
    return {
        "model": config.model,
        "topology": machine.name,
        "devices": len(machine.devices),
        "chips": machine.n_chips,
        "compiler": machine.platform,
        "slices": machine.n_slices,
        "mesh": {axis: size for axis, size in mesh.items() if size > 1},
        "batch_size": config.batch_size,
        "grad_accum": config.grad_accum,
        "seq_len": config.seq_len,
        "task": config.task,
        "group": job.group,
        "max_new_tokens": job.max_new_tokens,
        "images": job.images,
        "rows": _rows_in_words(job),
        "dtype": config.dtype,
        "quantize": job.outline.head.get("quantize", "none"),
        "attention": str(job.attention_choice),
        "experts": config.experts,
        "collective_matmul": None if job.products is None else str(job.products),
        "loss_chunk": job.head_chunk // job.layout.token_parts,
        "optimizer": config.optimizer,
        "peak_flops_per_device": machine.flops,
        "memory_bytes_per_second": machine.bandwidth,
        "memory_shares": machine.shares,
        "kernel_share": machine.kernel_share if machine.clock else None,
        "link_bytes_per_second": machine.link,
        "remarks": machine.remarks,
        "utilisation": config.utilisation or DEFAULT_UTILISATION,
        "tokens": config.tokens,
        "price": config.price,
    }


def _rows_in_words(job: PlanJob) -> str:
    """Returns a description of a step's batch, such as its rows and their lengths."""
    n_rows = job.batch_size * job.grad_accum
    sequence_words = f"{job.seq_len} tokens"
    sharing_words = ", a prompt once" if job.share_prompt else ""
    is_paired = job.task_facts.sequences > 1
    if is_paired:
        row_words = job.task_facts.rows.removesuffix("s") if n_rows == 1 else job.task_facts.rows
        pairs = f"{n_rows} {row_words} of {job.task_facts.sequences} × {sequence_words}"
        return f"{pairs}, {job.prompt} of them a prompt's{sharing_words}" if job.prompt else pairs
    if job.task_facts.draws:
        lengths = f"{job.seq_len - job.max_new_tokens} + {job.max_new_tokens}"
        return f"{n_rows} completions, {job.group} of a prompt, of {lengths} tokens{sharing_words}"
    if job.images:
        sequence_words += f" with {job.images} {'image' if job.images == 1 else 'images'}"
    return f"{n_rows} × {sequence_words}"
