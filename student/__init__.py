"""How a student comes to be and how it leaves: initialisation and export."""
