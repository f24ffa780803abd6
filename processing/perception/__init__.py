"""What other vision models see in an image: segments, boxes, relations and text, and the sentence made of them.

Unlike the files beside this folder, these do not travel with a model on the Hub: they run where unimoe is installed.
`results` holds the plain data; `interface` says what an adapter of each task offers; `perceiver` puts adapters together;
`verbalize` makes the text, `auxiliary` what a conversation carries of it. Importing any of them loads no vision model and no
optional package. What was seen is kept on disk by `trainers/caches/perception_cache.py`.
"""
