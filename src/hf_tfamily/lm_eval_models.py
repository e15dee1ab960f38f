"""lm-eval for models with a memory: texts longer than a window are read window by window, and nothing is forgotten.

    from lm_eval import simple_evaluate
    from hf_tfamily.lm_eval_models import RecurrentLM

    simple_evaluate(model=RecurrentLM(pretrained=folder, max_length=512), tasks=[...])

lm-eval's own HFLM starts every window of a long text anew. Import this module only where lm-eval is installed.
"""

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm


class RecurrentLM(HFLM):
    """An HFLM whose rolling log-likelihoods carry the model's memory from window to window."""

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, its first token being predicted from the start token."""
        texts = [request.args[0] for request in requests]
        return [self._log_likelihood(text) for text in tqdm(texts, disable=disable_tqdm)]

    @torch.inference_mode()
    def _log_likelihood(self, text: str) -> float:
        ids = torch.tensor([[self.prefix_token_id, *self.tok_encode(text)]], device=self.device)  # [1, 1 + N]
        windows = zip(ids[:, :-1].split(self.max_length, dim=1), ids[:, 1:].split(self.max_length, dim=1))
        total, memory = 0.0, None
        for inputs, targets in windows:
            outputs = self.model(inputs, past_key_values=memory, use_cache=True)
            memory = outputs.past_key_values
            log_probabilities = outputs.logits.float().log_softmax(dim=-1)  # [1, T, V]
            total += log_probabilities.gather(-1, targets[..., None]).sum().item()
        return total
