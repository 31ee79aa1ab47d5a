"""From logits to text: parameters, the draw of a token, stop conditions, detokenisation, constrained output.

`params`, `finish` and `stops` import no torch, so that a scheduler and a server's front can use them.
"""
