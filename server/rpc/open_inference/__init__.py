"""The Open Inference Protocol, translated: tensors to the requests of `multilora.v1`, and its replies to tensors."""
