"""Dense models and encoders that conversions start from, as others publish them.

`sources` (start here): a folder or Hub id, recognised by its tensors. `llama_family` (decoders of other classes),
`fused_layouts` (those that fuse tensors), `multimodal_layouts` and `picture_processor` (those that see),
`encoder_folders`, `beats_file`, `connector_fields`, `decoder_fields`, `licences`, `tokenizer_files`, `prepared_tokenizers`.
"""
