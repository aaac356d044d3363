"use strict";
// Everything listens on the document, so that parts which a live view puts in later work too.
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // -- light and dark -------------------------------------------------------------------------
  const kept = () => { try { return localStorage.getItem("suanli-theme"); } catch { return null; } };
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  if (kept() === "dark" || kept() === "light") root.dataset.theme = kept();
  const name = () => {
    const button = document.querySelector(".theme");
    if (button) button.textContent = dark() ? "Light" : "Dark";
  };
  name();
  const turn = () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("suanli-theme", root.dataset.theme); } catch { /* a file may keep nothing */ }
    name();
  };

  // -- tables ---------------------------------------------------------------------------------
  const key = (row, index, numeric) => {
    const cell = row.cells[index];
    if (!numeric) return cell.textContent.trim().toLowerCase();
    return cell.dataset.by === undefined ? NaN : Number(cell.dataset.by);
  };
  const sort = (button) => {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    const index = head.cellIndex, numeric = head.classList.contains("number");
    const now = head.getAttribute("aria-sort");
    const down = now === "none" ? numeric : now === "ascending";
    for (const other of head.parentNode.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [key(row, index, numeric), row]);
    rows.sort(([a], [b]) => {
      if (numeric) {
        if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
        return down ? b - a : a - b;
      }
      return (down ? -1 : 1) * a.localeCompare(b, "en", { numeric: true });
    });
    body.append(...rows.map(([, row]) => row));
  };
  const open = (button) => {
    const table = button.closest(".table").querySelector("table");
    const now = table.classList.toggle("open"), other = button.dataset.fewer;
    button.dataset.fewer = button.textContent;
    button.textContent = other;
    button.setAttribute("aria-expanded", String(now));
  };
  const filter = (box) => {
    const place = box.closest(".table"), table = place.querySelector("table");
    const wanted = box.value.trim().toLowerCase(), more = place.querySelector(".more");
    const opened = more && more.getAttribute("aria-expanded") === "true";
    table.classList.toggle("open", wanted !== "" || Boolean(opened));
    for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    if (more) more.hidden = wanted !== "";
  };

  // -- marks: pointing at one, or going to it with the arrow keys, shows what it is ------------
  const tip = document.getElementById("tip");
  let shown = null;
  const show = (mark) => {
    shown = mark;
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    const at = mark.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const x = Math.min(Math.max(at.left, 0) + Math.min(at.width, innerWidth) / 2, innerWidth) - own.width / 2;
    const above = at.top - own.height - 8;
    tip.style.left = `${Math.max(8, Math.min(x, innerWidth - own.width - 8))}px`;
    tip.style.top = `${above > 4 ? above : Math.min(at.bottom + 8, innerHeight - own.height - 4)}px`;
  };
  const hide = () => { shown = null; tip.hidden = true; };
  const STEP = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const walk = (event) => {
    const drawing = event.target.closest && event.target.closest("svg.drawing");
    if (!drawing || event.ctrlKey || event.metaKey || event.altKey) return;
    const marks = [...drawing.querySelectorAll(".mark")];
    if (!marks.length) return;
    const now = marks.indexOf(document.activeElement);
    let next;
    if (event.key in STEP) next = now < 0 ? 0 : now + STEP[event.key];
    else if (event.key === "Home") next = 0;
    else if (event.key === "End") next = marks.length - 1;
    else if (event.key === "Escape" && now >= 0) { drawing.focus(); hide(); return; }
    else return;
    event.preventDefault();
    marks[Math.max(0, Math.min(marks.length - 1, next))].focus();
  };

  // -- timeline -------------------------------------------------------------------------------
  const zoom = (button) => {
    const place = button.closest("figure"), lanes = place.querySelector(".lanes-inner");
    const outer = place.querySelector(".lanes");
    const before = Number(lanes.dataset.zoom || 1), step = button.dataset.zoom;
    const now = step === "0" ? 1 : Math.min(64, Math.max(1, before * Number(step)));
    const middle = (outer.scrollLeft + outer.clientWidth / 2) / lanes.clientWidth;
    lanes.dataset.zoom = String(now);
    lanes.style.width = `${now * 100}%`;
    outer.scrollLeft = middle * lanes.clientWidth - outer.clientWidth / 2;
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) {
      const mark = event.target.closest(".mark");
      if (mark) show(mark); else hide();
    } else if (button.classList.contains("theme")) turn();
    else if (button.classList.contains("sort")) sort(button);
    else if (button.classList.contains("more")) open(button);
    else if (button.dataset.zoom) zoom(button);
  });
  document.addEventListener("input", (event) => {
    if (event.target.classList.contains("filter")) filter(event.target);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    walk(event);
  });
  document.addEventListener("pointerover", (event) => {
    const mark = event.target.closest && event.target.closest(".mark");
    if (mark) show(mark);
    else if (event.pointerType === "mouse") hide();
  });
  document.addEventListener("focusin", (event) => {
    if (event.target.classList.contains("mark")) {
      event.target.scrollIntoView({ block: "nearest", inline: "nearest" });
      show(event.target);
    }
  });
  document.addEventListener("focusout", (event) => {
    if (event.target === shown) hide();
  });
  addEventListener("scroll", () => { if (shown && document.activeElement !== shown) hide(); }, { passive: true, capture: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
})();
