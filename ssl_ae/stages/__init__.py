"""The stages of a run, one function each: pretrain, extract, finetune, evaluate, predict; and `run`, which chains them."""
