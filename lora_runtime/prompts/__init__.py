"""How a request's texts become a prompt: an adapter's template, a conversation. No torch here."""
