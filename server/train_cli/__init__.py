"""`multilora train …`: its options, what it draws, and how a run is started and interrupted."""
