"""Writing correctors in forms that other programs load without this package."""
