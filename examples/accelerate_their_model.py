"""One line makes a transformers model faster, one line undoes it.

python examples/accelerate_their_model.py [MODEL]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import granite_kernels

name = sys.argv[1] if len(sys.argv) > 1 else "ibm-granite/granite-3.1-2b-instruct"
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name).to(device).eval()

chat = [{"role": "user", "content": "Name three minerals in granite."}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(device)
before = model.generate(**prompt, max_new_tokens=32, do_sample=False)

granite_kernels.accelerate(model)  # in place: the class, the weights and the state_dict stay as they are
print(granite_kernels.status(model))  # which kernel runs for which module and, where none does, why
after = model.generate(**prompt, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(after[0], skip_special_tokens=True))

granite_kernels.restore(model)  # exactly undone
print("the same tokens:", torch.equal(before, after))
