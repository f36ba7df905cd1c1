"""Models: one `ParamInfo` per weight, and pure layer functions on local shards. No collective is called here."""
