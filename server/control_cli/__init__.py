"""`multilora adapters list|show|register|…`: commands that a running server carries out."""
