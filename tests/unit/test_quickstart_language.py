"""The compact decoder of the quickstart before any training."""

import torch

from unimoe.modeling_unimoe.configuration_unimoe import UniMoeConfig
from unimoe.modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from unimoe.quickstart.language import compact_text_config, start_as_copier, train_tokenizer


def test_an_untrained_decoder_prefers_the_words_that_it_has_read() -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the cat and the dog see a red bird"], vocab_size=300)
    model = UniMoeForCausalLM(UniMoeConfig(text_config=compact_text_config(tokenizer))).eval()
    read, asked = torch.arange(20, 40), 50

    def advantage() -> float:
        """How far the words read before stand above all others when the last word is another one."""
        with torch.no_grad():
            logits = model(input_ids=torch.cat([read, torch.tensor([asked])])[None]).logits[0, -1]
        others = torch.ones(len(logits), dtype=torch.bool)
        others[[*read.tolist(), asked]] = False
        return float((logits[read].mean() - logits[others].mean()) / logits[others].std())

    before = advantage()
    start_as_copier(model)
    assert advantage() > before + 1.0
