// Values on hover, focus and tap; moving through the firing tokens of a context; short and whole contexts.
// Exported files carry this script, so it must not ask for anything.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  const root = document.documentElement;

  let shownFor = null;
  let shownAt = 0;

  function showTip(target) {
    shownFor = target;
    shownAt = target.getBoundingClientRect().top;
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    const box = target.getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(6, box.left + box.width / 2 - own.width / 2), root.clientWidth - own.width - 6);
    const above = box.top - own.height - 6;
    tip.style.left = `${left}px`;
    tip.style.top = `${above < 4 ? box.bottom + 6 : above}px`;
  }
  function hideTip() {
    tip.hidden = true;
  }
  const tipped = (event) => event.target instanceof Element && event.target.closest("[data-tip]");
  for (const kind of ["pointerover", "focusin", "click"]) {
    document.addEventListener(kind, (event) => {
      const target = tipped(event);
      if (target) showTip(target);
      else hideTip();
    });
  }
  // Hide it when its token has scrolled away from under it.
  const follow = () => !tip.hidden && shownFor && Math.abs(shownFor.getBoundingClientRect().top - shownAt) > 2 && hideTip();
  document.addEventListener("scroll", follow, { passive: true, capture: true });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());

  // Arrow keys inside a context walk over the tokens that can be seen.
  function seen(token, line) {
    const box = token.getBoundingClientRect();
    const part = (token.closest(".left, .right") || line).getBoundingClientRect();
    return box.width > 0 && box.left >= part.left - 1 && box.right <= part.right + 1;
  }
  document.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const line = event.target instanceof Element && event.target.closest(".text");
    if (!line) return;
    const tokens = [...line.querySelectorAll(".tok")].filter((t) => seen(t, line));
    if (!tokens.length) return;
    const at = tokens.indexOf(event.target);
    const step = event.key === "ArrowRight" ? 1 : -1;
    const start = tokens.findIndex((t) => t.classList.contains("peak"));
    const next = at < 0 ? Math.max(start, 0) : Math.min(Math.max(at + step, 0), tokens.length - 1);
    tokens[next].focus();
    event.preventDefault();
    event.stopImmediatePropagation();
  });

  // Short or whole contexts.
  const switches = document.querySelectorAll("[data-views]");
  function setView(view, keep) {
    root.dataset.view = view;
    for (const link of document.querySelectorAll("[data-view]:not(html)")) {
      if (link.dataset.view === view) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
    try {
      if (keep) localStorage.setItem("unweave-view", view);
    } catch {
      // only this page remembers it then
    }
  }
  for (const group of switches) {
    group.hidden = false;
    group.addEventListener("click", (event) => {
      const link = event.target.closest("[data-view]");
      if (!link) return;
      event.preventDefault();
      setView(link.dataset.view, true);
    });
  }
  if (switches.length) setView(root.dataset.view === "whole" ? "whole" : "short", false);
  document.addEventListener("unweave:view", () => setView(root.dataset.view === "whole" ? "short" : "whole", true));
})();
