"""transformers' generate with our decode loop: its logits processors, stopping criteria, seeds and streamers.

python examples/fast_decode.py [MODEL]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import granite_kernels

name = sys.argv[1] if len(sys.argv) > 1 else "ibm-granite/granite-3.1-2b-instruct"
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name).to(device).eval()

prompt = tokenizer("The oldest rocks on Earth", return_tensors="pt").to(device)
sampling = dict(max_new_tokens=32, do_sample=True, temperature=0.8, top_p=0.9, repetition_penalty=1.1)

torch.manual_seed(0)
model.generate(**prompt, **sampling, streamer=TextStreamer(tokenizer), custom_generate=granite_kernels.fast_decode)
