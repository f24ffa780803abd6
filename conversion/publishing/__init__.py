"""What a written folder holds beside its weights.

`hub` (the folder that loads without us, and its upload), `model_card`, `saved_receipt` (what the receipts of all conversions
have in common).
"""
