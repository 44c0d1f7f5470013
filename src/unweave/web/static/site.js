// Keyboard, theme, live filtering of the list, and the cursor on curves. The pages work without it.
"use strict";
(() => {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);

  // ---- theme ----
  const themes = ["auto", "light", "dark"];
  const names = { auto: "as the system", light: "light", dark: "dark" };
  const button = byId("theme");
  function showTheme() {
    const theme = root.dataset.theme || "auto";
    byId("theme-name").textContent = theme[0].toUpperCase() + theme.slice(1);
    button.setAttribute("aria-label", `Colour theme: ${names[theme]}`);
  }
  if (button) {
    button.hidden = false;
    showTheme();
    button.addEventListener("click", () => {
      const next = themes[(themes.indexOf(root.dataset.theme || "auto") + 1) % themes.length];
      if (next === "auto") delete root.dataset.theme;
      else root.dataset.theme = next;
      try {
        if (next === "auto") localStorage.removeItem("unweave-theme");
        else localStorage.setItem("unweave-theme", next);
      } catch {
        // only this page remembers it then
      }
      showTheme();
    });
  }

  // ---- help ----
  const help = byId("help");
  const open = byId("help-open");
  if (open) {
    open.hidden = false;
    open.addEventListener("click", () => help.showModal());
  }

  // ---- keyboard ----
  const follow = (selector) => {
    const link = document.querySelector(selector);
    if (link) link.click();
    return Boolean(link);
  };
  function stepRow(step) {
    const rows = [...document.querySelectorAll(".row-link")];
    if (!rows.length) return false;
    const at = rows.indexOf(document.activeElement);
    const next = at < 0 ? (step > 0 ? 0 : rows.length - 1) : Math.min(Math.max(at + step, 0), rows.length - 1);
    rows[next].focus();
    return true;
  }
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.altKey || event.ctrlKey || event.metaKey || help.open) return;
    const typing = event.target.closest("input, textarea, select, [contenteditable]");
    if (typing) {
      if (event.key === "Escape") typing.blur();
      return;
    }
    const box = byId("q") || byId("find");
    const actions = {
      "/": () => box && (box.focus(), box.select(), true),
      "?": () => (help.showModal(), true),
      ArrowLeft: () => follow("a[rel=prev]"),
      ArrowRight: () => follow("a[rel=next]"),
      k: () => stepRow(-1) || follow("a[rel=prev]"),
      j: () => stepRow(1) || follow("a[rel=next]"),
      v: () => document.dispatchEvent(new Event("unweave:view")),
      r: () => byId("find") && (location.assign("/features/random"), true),
    };
    const action = Object.hasOwn(actions, event.key) && actions[event.key];
    if (action && !event.target.closest("[role=listbox]") && action()) event.preventDefault();
  });

  // ---- the list filters as one types ----
  const filters = byId("filters");
  let waiting = 0;
  let running = null;
  async function refilter() {
    const pairs = [...new FormData(filters)].filter(([, value]) => value !== "");
    const query = new URLSearchParams(pairs).toString();
    const address = query ? `/features?${query}` : "/features";
    if (running) running.abort();
    running = new AbortController();
    const results = byId("results");
    results.setAttribute("aria-busy", "true");
    try {
      const answer = await fetch(address, { signal: running.signal });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.getElementById("results");
      if (!fresh) throw new Error("no list");
      results.replaceChildren(...fresh.childNodes);
      results.setAttribute("aria-busy", "false");
      history.replaceState(null, "", address);
    } catch (error) {
      if (error.name !== "AbortError") filters.submit();
    }
  }
  if (filters) {
    filters.addEventListener("input", (event) => {
      clearTimeout(waiting);
      waiting = setTimeout(refilter, event.target.type === "search" ? 180 : 0);
    });
  }

  // ---- the value under the pointer on a curve ----
  const tip = byId("tip");
  for (const chart of document.querySelectorAll("svg.line[data-points]")) {
    const points = JSON.parse(chart.dataset.points);
    const cursor = chart.querySelector(".cursor");
    const width = chart.viewBox.baseVal.width;
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const scale = box.width / width;
      const x = (event.clientX - box.left) / scale;
      const near = points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      cursor.setAttribute("cx", near[0]);
      cursor.setAttribute("cy", near[1]);
      cursor.setAttribute("r", 3.5);
      tip.textContent = `${near[3]} at ${near[2]} ${chart.dataset.unit}`;
      tip.hidden = false;
      const own = tip.getBoundingClientRect();
      const left = box.left + near[0] * scale - own.width / 2;
      tip.style.left = `${Math.min(Math.max(6, left), root.clientWidth - own.width - 6)}px`;
      tip.style.top = `${Math.max(4, box.top + near[1] * scale - own.height - 10)}px`;
    });
    chart.addEventListener("pointerleave", () => {
      tip.hidden = true;
      cursor.setAttribute("r", 0);
    });
  }
})();
