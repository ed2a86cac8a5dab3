"""Run Hugging Face pipelines on a split model: the pipeline is made with the model, and is then given the SplitModule.

python pipelines.py                       # tiny models with random weights, and a server in this process
python pipelines.py object-detection      # only one kind of pipeline
"""

from __future__ import annotations

import argparse

import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import torchsurgeon as ts
from torchsurgeon import serve

WORDS = ["[PAD]", "[UNK]", "[SEP]", "the", "cat", "sat", "on", "mat", "this", "example", "is", "about", "animals", "."]
LABELS = {"entailment": 0, "neutral": 1, "contradiction": 2}
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION = hf.ViTConfig(**SIZE, image_size=32, patch_size=8)
TEXT = hf.BertConfig(**SIZE, vocab_size=len(WORDS), num_labels=3, label2id=LABELS)
BOXES = hf.YolosConfig(**SIZE, image_size=[32, 32], patch_size=8, num_detection_tokens=5)
# What each pipeline runs: the model's class and configuration, and options of the call.
PIPELINES = {
    "image-classification": (hf.ViTForImageClassification, VISION, {}),
    "image-feature-extraction": (hf.ViTModel, VISION, {}),
    "object-detection": (hf.YolosForObjectDetection, BOXES, {"threshold": 0.0}),
    "text-classification": (hf.BertForSequenceClassification, TEXT, {}),
    "token-classification": (hf.BertForTokenClassification, TEXT, {}),
    "zero-shot-classification": (hf.BertForSequenceClassification, TEXT, {"candidate_labels": ["animals", "politics"]}),
    "feature-extraction": (hf.BertModel, TEXT, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", nargs="*", default=[*PIPELINES], help=f"among {', '.join(PIPELINES)}")
    kinds = parser.parse_args().kind
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", sep_token="[SEP]")
    pixels = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    boxes = hf.YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 48})
    photo, text, registry = Image.new("RGB", (40, 40), "red"), "the cat sat on the mat", serve.ModelRegistry()
    with serve.Server(serve.create_app(registry)) as server:
        for kind in kinds:
            make, config, options = PIPELINES[kind]
            torch.manual_seed(0)  # random weights; with your own, load them on both sides
            model = make(config).eval()
            given, key = (text, "tokenizer") if config is TEXT else (photo, "image_processor")
            processor = tokenizer if config is TEXT else boxes if config is BOXES else pixels
            pipe = hf.pipeline(kind, model=model, **{key: processor}, device="cpu")
            whole = pipe(given, **options)
            example = processor(given, return_tensors="pt")  # what the pipeline calls the model with
            registry.add(kind, model, example)
            with ts.SplitModule(model, example, server=server.url, name=kind) as split:
                split.partition = len(split.graph.layers) // 2
                pipe.model = split
                assert str(pipe(given, **options)) == str(whole)
                print(f"{kind}: the whole model's answer, {split.last.where}")
                assert split.last.degraded is None


if __name__ == "__main__":
    main()
