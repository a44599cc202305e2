"""llama.cpp, by the package xllamacpp: what a GGUF file answers there."""

import json
import urllib.request

import numpy as np


class LlamaCpp:
    """A model of llama.cpp, perhaps with an adapter; greedy, one text at a time, all in fp32."""

    def __init__(self, path, adapter=None, n_ctx=256, n_threads=1):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = n_ctx, 1, 0
        params.warmup, params.verbosity = False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
        fp32 = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_k = params.cache_type_v = fp32
        off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = off
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)
        # One that is dropped before its loop begins waits for the loop forever: it answers first.
        self._post("completion", {"prompt": [0], "n_predict": 0, "cache_prompt": False})

    def continue_ids(self, ids, n, every=8, reuse=False):
        """Returns the greedy continuation, and some tokens' most probable ones: [{id: logprob}].

        Args:
          ids: the prompt.
          n: the number of tokens; fewer come where the model ends the text.
          every: number of tokens, of which one is asked for its probabilities, by itself: the
            server leaves out those of a token that ends within a character.
          reuse: keep what was computed of a prompt (wrong where there are sliding windows).
        """
        ids = list(ids)
        asked = {"temperature": 0, "cache_prompt": reuse, "return_tokens": True}
        chosen = self._post("completion", {**asked, "prompt": ids, "n_predict": n})["tokens"]
        tops = [{} for _ in chosen]
        for at in range(0, len(chosen), every):
            prompt = [*ids, *chosen[:at]]
            said = self._post(
                "completion", {**asked, "prompt": prompt, "n_predict": 1, "n_probs": 8}
            )
            for step in said.get("completion_probabilities", ()):
                tops[at] = {top["id"]: top["logprob"] for top in step["top_logprobs"]}
        return chosen, tops

    def tokenize(self, text):
        """Returns the ids of a text, by the server's /tokenize."""
        body = {"content": text, "add_special": True, "parse_special": True}
        return self._post("tokenize", body)["tokens"]

    def _post(self, path, body):
        request = urllib.request.Request(
            f"{self._server.listening_address}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def distance(logprobs, prompt, ids, tops):
    """Returns the distances of llama.cpp's log-probabilities, and True if its choices are ours.

    Args:
      logprobs: ours, of the prompt and the continuation: [seq, vocab].
      prompt: the ids of the prompt.
      ids, tops: see `LlamaCpp.continue_ids`.
    """
    ours = logprobs[len(prompt) - 1 : len(prompt) - 1 + len(ids)]
    gaps = [abs(p - row[i]) for row, top in zip(ours, tops, strict=True) for i, p in top.items()]
    return np.array(gaps), bool(len(ids)) and list(ours.argmax(-1)) == list(ids)
