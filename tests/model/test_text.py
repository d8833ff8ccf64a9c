"""Ordinary text: a tokenizer trained here, padding on either side, one answer a text."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_hyla import HylaConfig, HylaForSequenceClassification


GOOD, BAD = ["good", "fine", "lovely", "great"], ["bad", "poor", "awful", "dull"]


def texts(count):
    """Texts of 3 to 11 words of which one tells the class."""
    draw = torch.Generator().manual_seed(0)

    def one_of(words):
        return words[int(torch.randint(len(words), (1,), generator=draw))]

    for index in range(count):
        words = [one_of(["the", "film", "was", "quite", "a", "very", "story"]) for _ in range(2 + index % 9)]
        label = index % 2
        words.insert(int(torch.randint(len(words) + 1, (1,), generator=draw)), one_of(GOOD if label else BAD))
        yield " ".join(words), label


@pytest.fixture(scope="module")
def tokenizer():
    raw = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.train_from_iterator(
        (text for text, _ in texts(200)), trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("attention_type", ["hyla", "linear", "softmax"])
def test_a_text_classifier_learns_with_the_plain_trainer(tmp_path, tokenizer, attention_type, padding_side):
    tokenizer.padding_side = padding_side
    torch.manual_seed(0)
    config = HylaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, answer_token_id=None, embedding_bias=False,
        num_answers=1, num_labels=2, attention_type=attention_type, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, head_dim=8, value_head_dim=8, intermediate_size=32, attention_dropout=0.0,
    )  # fmt: skip
    samples = [{**tokenizer(text, return_token_type_ids=False), "labels": label} for text, label in texts(600)]
    model = HylaForSequenceClassification(config)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=80, per_device_train_batch_size=32, learning_rate=3e-3, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=args, train_dataset=samples[:500], data_collator=DataCollatorWithPadding(tokenizer)
    )
    trainer.train()
    predictions = trainer.predict(samples[500:])
    accuracy = (predictions.predictions.argmax(-1) == predictions.label_ids).mean()
    assert accuracy > 0.8  # chance is 0.5

    alone = model(**tokenizer("the film was awful", return_tensors="pt", return_token_type_ids=False)).logits
    batch = tokenizer(["the film was awful", "quite a great story was the film"], padding=True, return_tensors="pt",
                      return_token_type_ids=False)  # fmt: skip
    torch.testing.assert_close(model(**batch).logits[:1], alone, atol=1e-4, rtol=1e-4)
    del batch["attention_mask"]  # then the pad token tells where the text ends, though padding is attended to
    assert model(**batch).logits.shape == (2, 2)
