// Runs before the page is painted, so that neither the theme nor the length of contexts flashes.
"use strict";
(() => {
  const root = document.documentElement;
  try {
    const theme = localStorage.getItem("unweave-theme");
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    const asked = new URLSearchParams(location.search).get("view");
    const view = asked || localStorage.getItem("unweave-view");
    if (view === "whole" || view === "short") root.dataset.view = view;
  } catch {
    // storage may be forbidden; the system's theme is a good default
  }
})();
