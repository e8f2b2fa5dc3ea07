"""Our own class over the weights of a transformers model, in their memory: nothing is copied.

python examples/engine_over_their_weights.py [MODEL]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from granite_kernels import GraniteForCausalLM

name = sys.argv[1] if len(sys.argv) > 1 else "ibm-granite/granite-3.1-2b-instruct"
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(name)
theirs = AutoModelForCausalLM.from_pretrained(name).to(device).eval()
ours = GraniteForCausalLM.from_transformers(theirs)

shared = {parameter.data_ptr() for parameter in ours.parameters()} == {parameter.data_ptr() for parameter in theirs.parameters()}
print("every weight is shared:", shared)
ids = tokenizer("Granite is an igneous rock", return_tensors="pt").input_ids.to(device)
print(tokenizer.decode(ours.generate(ids, max_new_tokens=32)[0]))
print(ours.memory())
