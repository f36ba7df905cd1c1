"""Models: what a family's config.json says, one `ParamInfo` per weight, and pure layer functions on local shards. No
collective is called here.

A family is a file and a line of `registry.FAMILIES`: `read_config` says its structure in `config.ModelConfig`, from
which `infos` declares its weights and the step does its work.
"""
